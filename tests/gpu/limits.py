"""What a card does at most, as PyTorch reaches it: reading memory, and bf16 products. One JSON object a line."""

import json
import statistics
import sys

import torch

device = torch.device(f"cuda:{sys.argv[1] if len(sys.argv) > 1 else 0}")


def seconds(work, rounds=20):
    """The median time of `work` in seconds."""
    for _ in range(3):
        work()
    times = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


with torch.cuda.device(device), torch.inference_mode():
    source = torch.ones(1 << 31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = source.numel() / seconds(lambda: target.copy_(source)) / 1e9
    # Each byte is read once and written once.
    print(json.dumps({"limit": "memory", "gb_per_s": round(2 * copied)}))
    size = 8192
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    b = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    rate = 2 * size**3 / seconds(lambda: a @ b) / 1e12
    print(json.dumps({"limit": "bf16", "tflops": round(rate, 1)}))
