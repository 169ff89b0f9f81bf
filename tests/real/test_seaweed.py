import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import s3fs
import yaml
import zarr

from stsr_core.store.group import finish, remove_store
from stsr_core.store.layout import create_ensemble
from tests.real.seaweed import executable
from tests.store.made import LAYOUT

COMPOSE = Path(__file__).parents[2] / "infra" / "compose.yaml"


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


def test_compose_makes_the_bucket_once_and_finds_it_there_when_it_starts_again(s3):
    service = yaml.safe_load(COMPOSE.read_text())["services"]["bucket"]
    command = " ".join(service["command"]).replace("s3:9333", s3.master).replace("s3:8888", s3.filer)
    path = f"{Path(executable()).parent}{os.pathsep}{os.environ['PATH']}"
    s3.make_bucket("stsr-other")  # begins with the same letters
    for said in ("created bucket stsr", ""):
        done = subprocess.run(
            [*service["entrypoint"], command],
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert said in done.stdout and bool(said) == bool(done.stdout)
    assert s3fs.S3FileSystem(**s3.options, skip_instance_cache=True).exists("stsr")
