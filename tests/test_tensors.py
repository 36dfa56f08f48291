"""The tools that every reader and writer shares: transposing in strips, and memory for a model."""

import numpy as np
import pytest

from visualbert.checkpoint.tensors import STORED, Memory, transpose

SHAPES = [(1, 1), (3, 17), (17, 3), (16, 5), (33, 40), (0, 5), (5, 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "bool"])
def test_transpose_is_a_contiguous_copy(shape, dtype):
    array = np.arange(np.prod(shape)).reshape(shape).astype(STORED[dtype])
    found = transpose(array)
    assert found.flags.c_contiguous
    assert found.dtype == array.dtype
    assert not np.shares_memory(found, array)
    np.testing.assert_array_equal(found, array.T)


def test_transpose_of_a_view_into_given_memory():
    array = np.arange(600.0).reshape(20, 30)[::2, 3:]
    into = np.full((27, 10), np.nan)
    assert transpose(array, into) is into
    np.testing.assert_array_equal(into, array.T)


def test_an_endless_matrix_without_elements_ends():
    assert transpose(np.empty((2**40, 0), np.float32)).shape == (0, 2**40)


def test_memory_gives_aligned_arrays_that_do_not_overlap():
    shapes = [(3,), (5, 7), (1,), (64,)]
    types = [STORED[name] for name in ("float32", "float64", "bfloat16", "float16")]
    memory = Memory(sum(map(Memory.room, shapes)))
    arrays = [memory.take(shape, dtype) for shape, dtype in zip(shapes, types, strict=True)]
    for number, array in enumerate(arrays):
        array[...] = number
    for number, (array, shape) in enumerate(zip(arrays, shapes, strict=True)):
        assert array.shape == shape
        assert array.ctypes.data % 64 == 0
        assert (array == number).all()
