"""The GPU's weighted sum, under Triton's interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1000), (8, 2049)])
def test_weighted_sum(shape, dtype):
    """As a product of matrices; what an example of weight zero holds is not read."""
    from dpopt.grad_sample.sums_triton import weighted_sum

    torch.manual_seed(0)
    rows, weights = torch.randn(shape, device=DEVICE).to(dtype), torch.rand(shape[0], device=DEVICE)
    expected = weights.double() @ rows.double()
    if shape[0] > 1:
        expected -= weights[1].double() * rows[1].double()
        weights[1], rows[1] = 0.0, float("nan")
    torch.testing.assert_close(weighted_sum(rows, weights).double(), expected, rtol=1e-5, atol=1e-6)
