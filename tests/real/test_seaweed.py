import pytest
import s3fs


def test_the_server_keeps_objects_and_refuses_other_keys(s3):
    bucket = s3.make_bucket("kept")
    fs = s3fs.S3FileSystem(**s3.options, skip_instance_cache=True)
    fs.pipe_file(f"{bucket}/a", b"content")
    assert fs.cat_file(f"{bucket}/a") == b"content"
    with pytest.raises(PermissionError):
        s3fs.S3FileSystem(**{**s3.options, "secret": "wrong"}, skip_instance_cache=True).cat_file(f"{bucket}/a")
