"""Makes tests/golden.npz for test_model.py: what PyTorch's Transformer stacks compute.

It needs PyTorch, which the tests do not. To make the file again:

    pip install torch==2.13.0 numpy
    python tests/measure/make_golden.py

golden.npz then holds, as float32 unless said otherwise:

    source [3, 7, 16], target [3, 5, 16]     what goes into the two stacks
    source_lengths, target_lengths           int; positions from there on are padding
    encoder.NAME, decoder.NAME               the weights, NAME as in the state_dict
    post_norm.memory, post_norm.output       what comes out of the encoder, the decoder
    pre_norm.memory, pre_norm.output         the same with norm_first=True

Both norm orders have the same weights; post-norm leaves out the final NAME "norm".
"""

import pathlib

import numpy as np
import torch
from torch import nn

D_MODEL, NUM_HEADS, D_FF, NUM_LAYERS = 16, 4, 32, 2
LAYER_NORM_EPSILON = 1e-6


def make_stack(kind, norm_first):
    """Returns an encoder or a decoder; dropout 0, so training mode is exact."""
    layer_class, stack_class, options = {
        "encoder": (
            nn.TransformerEncoderLayer,
            nn.TransformerEncoder,
            {"enable_nested_tensor": False},
        ),
        "decoder": (nn.TransformerDecoderLayer, nn.TransformerDecoder, {}),
    }[kind]
    layer = layer_class(
        D_MODEL,
        NUM_HEADS,
        D_FF,
        dropout=0.0,
        activation="relu",
        layer_norm_eps=LAYER_NORM_EPSILON,
        batch_first=True,
        norm_first=norm_first,
    )
    norm = nn.LayerNorm(D_MODEL, eps=LAYER_NORM_EPSILON) if norm_first else None
    # Evaluation mode would take the fused kernels; training mode is the plain code.
    return stack_class(layer, NUM_LAYERS, norm=norm, **options).train()


def random_weights(stack):
    """Returns weights for all of a stack's names, none of them left at zero or one but
    the biases of attention's projections, which are zero: ours have none.
    """
    weights = {}
    for name, value in stack.state_dict().items():
        noise = torch.randn(value.shape)
        if value.ndim == 2:
            weights[name] = noise / value.shape[1] ** 0.5
        elif name.endswith("weight"):  # of a LayerNorm
            weights[name] = 1 + noise / 2
        else:
            weights[name] = noise / 2
        if "attn" in name and name.endswith("bias"):
            weights[name] = torch.zeros(value.shape)
    return weights


def main():
    torch.manual_seed(0)
    source = torch.randn(3, 7, D_MODEL)
    target = torch.randn(3, 5, D_MODEL)
    # Variances that are not far above the LayerNorm's epsilon make it visible.
    source[1] *= 0.01
    target[1] *= 0.01
    source_lengths = torch.tensor([7, 4, 2])
    target_lengths = torch.tensor([3, 5, 1])
    weights = {
        kind: random_weights(make_stack(kind, norm_first=True))
        for kind in ("encoder", "decoder")
    }
    arrays = {
        "source": source,
        "target": target,
        "source_lengths": source_lengths,
        "target_lengths": target_lengths,
    }
    for kind, named in weights.items():
        arrays |= {f"{kind}.{name}": value for name, value in named.items()}

    # In PyTorch's masks True stands for what may not be attended to.
    source_padding = torch.arange(7) >= source_lengths[:, None]
    target_padding = torch.arange(5) >= target_lengths[:, None]
    future = torch.ones(5, 5, dtype=torch.bool).triu(diagonal=1)
    for order, norm_first in ("post_norm", False), ("pre_norm", True):
        stacks = {}
        for kind, named in weights.items():
            stacks[kind] = make_stack(kind, norm_first)
            names = stacks[kind].state_dict().keys()
            stacks[kind].load_state_dict({name: named[name] for name in names})
            stacks[kind].double()  # so that float32 rounds the results only once
        memory = stacks["encoder"](source.double(), src_key_padding_mask=source_padding)
        output = stacks["decoder"](
            target.double(),
            memory,
            tgt_mask=future,
            tgt_key_padding_mask=target_padding,
            memory_key_padding_mask=source_padding,
        )
        arrays |= {f"{order}.memory": memory, f"{order}.output": output}

    arrays = {name: value.detach().numpy() for name, value in arrays.items()}
    for name, value in arrays.items():
        arrays[name] = value.astype("float32" if value.dtype.kind == "f" else "int32")
    np.savez_compressed(pathlib.Path(__file__).parents[1] / "golden.npz", **arrays)


if __name__ == "__main__":
    main()
