import pytest

from stsr_core.catalog.addresses import inside, is_name


@pytest.mark.parametrize(
    ("href", "expected"),
    [
        ("./map.tif", True),
        ("./data.zarr/ensemble", True),
        ("map.tif", False),
        ("../map.tif", False),
        ("./a/../../map.tif", False),
        (".//etc/passwd", False),  # below a folder of a local disk it would be an absolute path
        ("/etc/passwd", False),
        ("s3://bucket/map.tif", False),
    ],
)
def test_an_address_is_inside_only_if_it_cannot_leave_its_folder(href, expected):
    assert inside(href) is expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("rain", True), ("rain-1km", True), ("", False), (".rain", False), ("..", False), ("a/b", False), ("a\\", False)],
)
def test_a_product_is_called_like_one_folder(name, expected):
    assert is_name(name) is expected
