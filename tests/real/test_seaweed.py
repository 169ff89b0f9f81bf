from dataclasses import replace

import pytest
import s3fs
import zarr

from stsr_core.store.layout import create_ensemble, finish, remove_store
from tests.store.test_store import LAYOUT


def test_the_server_keeps_objects_and_refuses_other_keys(s3):
    bucket = s3.make_bucket("kept")
    fs = s3fs.S3FileSystem(**s3.options, skip_instance_cache=True)
    fs.pipe_file(f"{bucket}/a", b"content")
    assert fs.cat_file(f"{bucket}/a") == b"content"
    with pytest.raises(PermissionError):
        s3fs.S3FileSystem(**{**s3.options, "secret": "wrong"}, skip_instance_cache=True).cat_file(f"{bucket}/a")


def test_a_store_is_replaced_though_the_server_keeps_empty_folders(s3):
    url = f"{s3.make_bucket('replaced')}/ensemble"
    create_ensemble(url, LAYOUT, array="precipitation", options=s3.options)
    finish(url, {}, s3.options)
    remove_store(url, s3.options)
    fewer = replace(LAYOUT, members=1, member_block=1)
    create_ensemble(url, fewer, array="precipitation", options=s3.options)
    finish(url, {}, s3.options)
    found = zarr.open_group(url, mode="r", storage_options=s3.options)
    assert found["precipitation"].shape == fewer.shape
