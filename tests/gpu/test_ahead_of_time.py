"""Every Triton kernel compiles for the GPUs that users have, as the library launches it."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow

STEPS = ("MicroAdam, weight decay", "MicroAdam, bf16", "MicroAdam, 32 bits")
OTHERS = {
    "noise": "noise_kernel",
    "sum, bf16": "sum_kernel",
    "norms, bf16": "square_kernel",
    "convolution": "conv_kernel",
    "convolution, bf16": "conv_kernel",
    "group normalization, bf16": "group_norm_kernel",
    "norms, standardized": "standardized_kernel",
    "gradients, standardized": "standardized_kernel",
}
PROGRAM = """
import json, sys
from dataclasses import asdict
import check_kernels
print(json.dumps([asdict(one) for one in check_kernels.compile_all([int(sys.argv[1])], json.loads(sys.argv[2]))]))
"""


@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 120])
def test_kernels_compile(capability, tmp_path):
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM, str(capability), json.dumps([*STEPS, *OTHERS])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    kernels = {(one["launch"], one["kernel"]) for one in found}
    steps = {(launch, kernel) for launch in STEPS for kernel in ("step_kernel", "dense_kernel")}
    turned = {(launch, "transpose_kernel") for launch in OTHERS if launch.startswith("convolution")}
    assert kernels == steps | set(OTHERS.items()) | turned
    for one in found:
        assert one["instructions"] > 50, one
        # Two programs fit the 100 KB of a multiprocessor of a consumer card.
        assert one["shared"] <= 50 << 10, one
        # Bytes of a thread that no register holds; two steps and four of the others fit on a multiprocessor.
        assert one["stack"] <= {"step_kernel": 256}.get(one["kernel"], 32), one
        assert one["registers"] <= {"step_kernel": 128, "conv_kernel": 255}.get(one["kernel"], 128), one
