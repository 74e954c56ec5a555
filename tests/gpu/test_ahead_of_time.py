"""Every Triton kernel compiles for the GPUs that users have, as the library launches it."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = pytest.mark.slow

LAUNCHES = ("MicroAdam, weight decay", "MicroAdam, bf16", "MicroAdam, 32 bits", "noise", "sum of 64 gradients, bf16")
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
    command = [sys.executable, "-c", PROGRAM, str(capability), json.dumps(LAUNCHES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    kernels = {(one["launch"], one["kernel"]) for one in found}
    steps = {(launch, kernel) for launch in LAUNCHES[:3] for kernel in ("step_kernel", "dense_kernel")}
    assert kernels == steps | {("noise", "noise_kernel"), (LAUNCHES[-1], "sum_kernel")}
    for one in found:
        assert one["instructions"] > 50, one
        assert one["registers"] <= 128 and one["shared"] <= 48 << 10, one  # two programs fit on a multiprocessor
    # Values that no register holds cost a little of a step; noise and sums, which run far more often, have none.
    assert all(one["stack"] == 0 for one in found if one["kernel"] in ("noise_kernel", "sum_kernel", "dense_kernel"))
