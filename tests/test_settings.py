import pytest

from stsr_core.errors import ConfigurationError
from stsr_core.settings import Settings


def test_settings_come_from_the_environment_and_hide_secrets(monkeypatch):
    monkeypatch.setenv("STSR_WORKERS", "3")
    monkeypatch.setenv("STSR_S3_ENDPOINT", "http://localhost:1")
    monkeypatch.setenv("STSR_S3_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("STSR_S3_SECRET_ACCESS_KEY", "very-secret")
    settings = Settings()
    assert settings.workers == 3
    assert settings.s3_options == {"endpoint_url": "http://localhost:1", "key": "key", "secret": "very-secret"}
    assert "very-secret" not in repr(settings)


def test_sources_are_read_by_their_own_settings_or_by_those_of_the_store(monkeypatch):
    monkeypatch.setenv("STSR_S3_ENDPOINT", "http://localhost:1")
    monkeypatch.setenv("STSR_S3_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("STSR_S3_SECRET_ACCESS_KEY", "very-secret")
    assert Settings().source_options("s3://bucket/a.nc") == Settings().s3_options
    assert Settings().source_options("gs://bucket/a.nc") == {}
    monkeypatch.setenv("STSR_SOURCE_S3_ANONYMOUS", "true")
    assert Settings().source_options("s3://bucket/a.nc") == {"anon": True}
    monkeypatch.setenv("STSR_SOURCE_S3_ANONYMOUS", "false")
    monkeypatch.setenv("STSR_SOURCE_S3_PROFILE", "nightly")
    assert Settings().source_options("s3://bucket/a.nc") == {"profile": "nightly"}


def test_a_leading_tilde_is_the_home_folder_and_urls_stay_as_they_are(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("CATALOG_FILE", "DESTINATION", "CHECKPOINTS", "REPOSITORY", "RELEASES"):
        monkeypatch.setenv(f"STSR_{name}", "~/x")
        assert str(getattr(Settings(), name.lower())) == "/home/me/x"
    monkeypatch.setenv("STSR_DESTINATION", "s3://bucket/~me")
    assert Settings().destination == "s3://bucket/~me"
    assert Settings(checkpoints=None).checkpoints is None


def test_a_setting_that_is_not_understood_is_refused_by_the_name_of_its_variable(monkeypatch):
    monkeypatch.setenv("STSR_DEVICE", "tpu")
    monkeypatch.setenv("STSR_WORKERS", "abc")
    with pytest.raises(
        ConfigurationError, match=r"STSR_DEVICE: Input should be .*; STSR_WORKERS: .*valid integer.*\.env"
    ):
        Settings()


def test_an_empty_variable_is_unset_and_hides_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("STSR_SCHEDULER_ADDRESS=tcp://elsewhere:8786\nSTSR_ALERT_URL=\n")
    monkeypatch.setenv("STSR_SCHEDULER_ADDRESS", "")
    monkeypatch.setenv("STSR_WORKERS", "")
    assert Settings().scheduler_address == "tcp://elsewhere:8786"
    assert Settings().alert_url is None
    assert Settings().workers == 0


def test_a_file_that_cannot_be_read_is_refused_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_bytes("STSR_ALERT_URL=https://h\xe9".encode("latin-1"))
    with pytest.raises(ConfigurationError, match=rf"{tmp_path}/.env cannot be read .*codec.*UTF-8 text") as caught:
        Settings()
    assert caught.value.__cause__ is None

    def closed(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pydantic_settings.sources.providers.dotenv.dotenv_values", closed)
    (tmp_path / "other").write_text("")
    with pytest.raises(ConfigurationError, match=rf"{tmp_path}/other cannot be read .*Permission denied"):
        Settings(_env_file=tmp_path / "other")
