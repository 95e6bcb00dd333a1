"""The least time that the model's work can take on a device: its arithmetic and memory traffic, and measured ceilings.

A matrix product of (m, k) and (k, n) counts 2 m k n floating-point operations; attention of T queries over S positions
counts 4 T S dim, masked pairs included, as they are computed. Left out, as they are below a hundredth: LayerNorm, GELU,
rotary positions, softmax, biases, resizing. `python -m benchmark.roofline 70 600` tells what the real model can do at
most on a device of 70 TFLOP/s and 600 GB/s. Test: pytest tests/test_roofline.py
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pipeline.moondream.config import MoondreamConfig, TextConfig
from pipeline.moondream.device import synchronize

ENOUGH_S = 0.03  # a product that takes so long is timed well; a small one would measure its launch
SMALLEST, LARGEST = 512, 8192  # rows of the squares multiplied, doubling until ENOUGH_S
PROMPT_LEN = 9  # of "Describe this scene.", templates included
MIN_REPEATS, MAX_REPEATS, REPEAT_S = 3, 50, 0.3


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in simple operations, with as many threads as torch uses."""

    matmul_flops: float  # per second, in the model's dtype
    float32_flops: float  # likewise, in float32
    bandwidth_bytes: float  # per second, read from memory

    def least_s(self, flops: float, num_bytes: float = 0.0) -> float:
        """The shortest time for this arithmetic while this much is read: the longer of the two."""
        return max(flops / self.matmul_flops, num_bytes / self.bandwidth_bytes)


def encode_flops(config: MoondreamConfig, num_crops: int, num_images: int) -> int:
    """Of the encoder over crops, and the projection of images' joined features into tokens.

    A crop: P patches x [2 x 3 patch_size^2 C + n_layers x (2 (4 C^2 + 2 C ff_dim) + 4 P C)]  # 0.667 TFLOP in the 2b
    An image: P patches x 2 (2 C inner_dim + inner_dim out_dim)                               # 0.052 TFLOP
    """
    v = config.vision
    layer = 2 * (4 * v.enc_dim**2 + 2 * v.enc_dim * v.enc_ff_dim) + 4 * v.num_patches * v.enc_dim
    patch = 2 * v.in_channels * v.enc_patch_size**2 * v.enc_dim + v.enc_n_layers * layer
    projection = 2 * (2 * v.enc_dim * v.proj_inner_dim + v.proj_inner_dim * v.proj_out_dim)
    return v.num_patches * (num_crops * patch + num_images * projection)


def prefill_flops(config: MoondreamConfig, num_positions: int, num_before: int = 0) -> int:
    """Of one sequence's prefix, or of its prompt after `num_before` positions; without logits.

    T x n_layers x (2 weights of a layer + 4 (num_before + T) dim)  # 1.87 TFLOP for the 730 of an image in the 2b
    """
    text = config.text
    attention = 4 * (num_before + num_positions) * text.dim
    return num_positions * text.n_layers * (2 * layer_weights(text) + attention)


def decode_flops(config: MoondreamConfig, num_slots: int, num_positions: int) -> int:
    """Of one decode step over `num_slots` sequences that attend to `num_positions` each, with their logits.

    num_slots x (n_layers x (2 weights of a layer + 4 num_positions dim) + 2 vocab dim)  # 2.8 GFLOP a token in the 2b
    """
    text = config.text
    layer = 2 * layer_weights(text) + 4 * num_positions * text.dim
    return num_slots * (text.n_layers * layer + 2 * text.vocab_size * text.dim)


def decode_bytes(config: MoondreamConfig, itemsize: int, num_slots: int, num_positions: int) -> int:
    """Read by one decode step: the text model's weights and lm_head once, and the keys and values of every slot.

    itemsize x (n_layers x weights of a layer + vocab dim + num_slots num_positions 2 n_layers n_kv_heads head_dim)
    # in the 2b, bfloat16: 2.6 GB, and 0.15 GB for each slot at 760 positions
    """
    text = config.text
    kv_of_position = 2 * text.n_layers * text.n_kv_heads * text.head_dim
    lm_head = text.vocab_size * text.dim
    return prefill_bytes(config, itemsize) + itemsize * (lm_head + num_slots * num_positions * kv_of_position)


def prefill_bytes(config: MoondreamConfig, itemsize: int) -> int:
    """Read by one pass of the text model, however many positions: its layers' weights once. It counts for prompts."""
    return itemsize * config.text.n_layers * layer_weights(config.text)


def layer_weights(text: TextConfig) -> int:
    """Of one layer of the text model: qkv, proj and the MLP, without biases."""
    return text.dim * text.qkv_dim + text.dim**2 + 2 * text.dim * text.ff_dim  # 50.3 million in the 2b


def least_frame_s(
    config: MoondreamConfig, ceilings: Ceilings, itemsize: int, num_crops: int, num_slots: int, num_tokens: int
) -> dict[str, float]:
    """The least seconds that a frame takes by phase, of `num_slots` that are described together; with a prompt of
    PROMPT_LEN tokens and an answer of `num_tokens`."""
    positions = config.prefix_len + PROMPT_LEN + num_tokens // 2  # on average
    prompts = num_slots * prefill_flops(config, PROMPT_LEN, config.prefix_len)
    step_s = ceilings.least_s(
        decode_flops(config, num_slots, positions), decode_bytes(config, itemsize, num_slots, positions)
    )
    return {
        "encode": ceilings.least_s(encode_flops(config, num_crops, 1)),
        "prefill": ceilings.least_s(prefill_flops(config, config.prefix_len))
        + ceilings.least_s(prompts, prefill_bytes(config, itemsize)) / num_slots,
        "decode": step_s * (num_tokens - 1) / num_slots,  # the prompt gives the first token
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.roofline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tflops", type=float, help="TFLOP/s of matrix products in the model's format, without sparsity")
    parser.add_argument("gbs", type=float, help="GB/s from the device's memory")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default: %(default)s)")
    args = parser.parse_args(arguments)
    ceilings = Ceilings(1e12 * args.tflops, float("nan"), 1e9 * args.gbs)
    print("| crops | slots | encode | prefill | decode | a frame | frames/s | tokens/s |", "| --- " * 8 + "|", sep="\n")
    for num_crops in (1, 9):  # up to 378 pixels high or wide, and 1280 x 720 or 1920 x 1080
        for num_slots in (1, 8, 16, 32):
            phases = least_frame_s(MoondreamConfig(), ceilings, 2, num_crops, num_slots, args.tokens)
            frame_s = sum(phases.values())
            times = [f"{1000 * spent_s:.0f} ms" for spent_s in (*phases.values(), frame_s)]
            print("|", " | ".join([str(num_crops), str(num_slots), *times, f"{1 / frame_s:.1f}"]), end=" | ")
            print(f"{args.tokens / frame_s:.0f} |")
    return 0


@torch.inference_mode()
def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """By the fastest of repeated operations, as whatever else the machine does only slows them; 2 to 4 s in all."""
    matmul_flops = _matmul_rate(device, dtype)
    float32_flops = matmul_flops if dtype == torch.float32 else _matmul_rate(device, torch.float32)
    return Ceilings(matmul_flops, float32_flops, _read_rate(device))


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of squares that take long enough; the size is found by doubling, as slow formats take minutes at once."""
    size = SMALLEST
    while True:
        x, weight = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product_s = _fastest_s(lambda x=x, weight=weight: F.linear(x, weight), device)
        if product_s >= ENOUGH_S or size == LARGEST:
            return 2 * size**3 / product_s
        size *= 2


def _read_rate(device: torch.device) -> float:
    """Bytes per second of the fastest of three ways to go through far more memory than the caches hold."""
    size = 16384 if device.type == "cuda" else 8192  # 1 GiB and 256 MiB
    square, vector = torch.ones(size, size, device=device), torch.ones(size, device=device)
    copy = torch.empty_like(square)
    ways: dict[Callable[[], object], int] = {
        lambda: torch.mv(square, vector): square.nbytes,
        square.amax: square.nbytes,
        lambda: copy.copy_(square): 2 * square.nbytes,  # reads and writes
    }
    return max(num_bytes / _fastest_s(run, device) for run, num_bytes in ways.items())


def _fastest_s(run: Callable[[], object], device: torch.device) -> float:
    """The shortest time that an operation takes, warmed up once, repeated for REPEAT_S."""
    times_s: list[float] = []
    run()
    synchronize(device)
    ends_s = time.perf_counter() + REPEAT_S
    while len(times_s) < MIN_REPEATS or (time.perf_counter() < ends_s and len(times_s) < MAX_REPEATS):
        started_s = time.perf_counter()
        run()
        synchronize(device)
        times_s.append(time.perf_counter() - started_s)
    return min(times_s)


if __name__ == "__main__":
    sys.exit(main())
