import io

import numpy as np
import pytest
import zarr
from matplotlib.image import imread

from stsr_core.grids import Axis, Grid
from stsr_core.store.pictures import summary, thumbnail


def test_the_map_holds_the_total_and_the_largest_step_of_the_mean(tmp_path):
    nan = np.nan
    mean = np.array([[[1, 3, nan]], [[4, nan, nan]], [[2, 1, nan]]], np.float32)
    zarr.create_array(str(tmp_path / "mean"), data=mean, chunks=(2, 1, 3))
    np.testing.assert_array_equal(summary(str(tmp_path)), [[[7, 4, nan]], [[4, 3, nan]]])


@pytest.mark.parametrize("step", [1000.0, -1000.0])
def test_north_is_at_the_top_of_a_thumbnail(step):
    total = np.zeros((4, 4), np.float32)
    total[-1 if step > 0 else 0] = 500.0
    axis = Axis(0.0, step, 4)
    pixels = imread(io.BytesIO(thumbnail(total, Grid(axis, axis))))[..., :3]
    assert (pixels[1:] == 1).all()
    assert (pixels[0] != 1).any()
