"""The MLflow run record against a SQLite store and against a real `mlflow server` process."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from qvl.errors import Terminated, UserError
from qvl.provenance import command_line, provenance_tags
from qvl.redaction import REDACTED, redact, redact_known_secrets
from qvl.tracking import add_to_run, open_run

SERVER_START_SECONDS = 60


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    # Set here so that what open_run adds for the process is undone after each test.
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


@pytest.fixture(scope="module")
def store_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One SQLite store for most tests: making its tables takes seconds."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "flickr8k" / "first-run"
    folder.mkdir(parents=True)
    return folder


def _client(store_dir: Path):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{store_dir / 'mlflow.db'}")


def _load_table(monkeypatch: pytest.MonkeyPatch, store_dir: Path, experiment_id: str, run_id: str) -> dict[str, list]:
    """The predictions as MLflow's own reader gives them; it goes by the environment whatever its client goes by."""
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store_dir / 'mlflow.db'}")
        return _client(store_dir).load_table(experiment_id, "predictions.json", [run_id]).to_dict("list")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module", autouse=True)
def server_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A starting `mlflow server`; it gets ready while the tests before those that need it run. Yields its port."""
    folder, port = tmp_path_factory.mktemp("server"), _free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder / 'mlflow.db'}",
        "--artifacts-destination",
        str(folder / "a"),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield port
    finally:
        # It has uvicorn and job-runner children; they are in its group.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def server_port(server_process: int) -> int:
    deadline = time.monotonic() + SERVER_START_SECONDS
    while time.monotonic() < deadline:
        with suppress(OSError):
            with urllib.request.urlopen(f"http://127.0.0.1:{server_process}/health", timeout=2) as answer:
                assert answer.status == 200
                return server_process
        time.sleep(0.3)
    raise TimeoutError(f"mlflow server did not answer within {SERVER_START_SECONDS} s")


class Proxy:
    """Forwards TCP connections to a port until it is cut; lets a test take a real server away and give it back."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.is_cut = False
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self.is_cut = True
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                if self.is_cut:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self.target_port))
                self.connections += [client, server]
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


def test_import_is_cheap():
    code = "import sys, qvl.tracking; print(sorted({'mlflow', 'torch', 'pandas', 'requests'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_sqlite_store_records_everything(store_dir: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    (run_dir / "metrics.json").write_text('{"baseline": null}')
    (run_dir / "adapter").mkdir()
    (run_dir / "adapter" / "adapter_model.safetensors").write_bytes(b"\x00\xff")
    (run_dir / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (run_dir / "checkpoints" / "checkpoint-1" / "optimizer.pt").write_bytes(b"big")
    (run_dir / ".metrics.json.x1").write_text("half")
    rows = [
        {"id": "a", "references": ["a cat", "the cat"], "baseline": "a dog", "finetuned": "a cat"},
        {"id": "b", "references": ["b"], "baseline": None, "finetuned": "b"},
    ]
    params = {"learning_rate": 1e-4, "lora_target_modules": ["q_proj", "v_proj"], "long": "x" * 7000}
    params |= {f"param_{index}": index for index in range(150)}
    with open_run("everything", run_dir, params, store_dir, tags={"stage": "all"}) as record:
        for step in range(3):
            record.log_metrics({"loss": 2.0 - step, "grad norm (max)": 1.5, "absent": None}, step)
        record.log_metrics({"finetuned_bleu4": 0.1294, "bad": math.nan})
        record.log_files(run_dir)
        record.log_predictions(rows)

    # Everything, artifacts too, must be found from another working directory.
    monkeypatch.chdir("/")
    client = _client(store_dir)
    run = client.get_run(record.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first-run"
    assert client.get_experiment(run.info.experiment_id).name == "everything"
    assert [(point.step, point.value) for point in client.get_metric_history(record.run_id, "loss")] == [
        (0, 2.0),
        (1, 1.0),
        (2, 0.0),
    ]
    assert set(run.data.metrics) == {"loss", "grad norm _max_", "finetuned_bleu4", "bad"}
    assert math.isnan(run.data.metrics["bad"])
    assert run.data.params["learning_rate"] == "0.0001"
    assert run.data.params["param_149"] == "149"
    assert len(run.data.params["long"]) == 6000
    assert run.data.params["long"].endswith("…")
    assert run.data.tags["recipe"] == "everything"
    assert run.data.tags["stage"] == "all"
    assert {file.path for file in client.list_artifacts(record.run_id)} == {
        "adapter",
        "metrics.json",
        "predictions.json",
    }
    adapter = client.download_artifacts(record.run_id, "adapter/adapter_model.safetensors")
    assert Path(adapter).read_bytes() == b"\x00\xff"
    table = _load_table(monkeypatch, store_dir, run.info.experiment_id, record.run_id)
    assert table["finetuned"] == ["a cat", "b"]
    assert table["references"][0] == ["a cat", "the cat"]
    assert record.run_url is None
    assert re.fullmatch(rf"\S*mlflow ui --backend-store-uri sqlite:///{store_dir}/mlflow.db", record.ui_command)


def test_files_are_uploaded_once_and_again_when_changed(store_dir: Path, run_dir: Path):
    (run_dir / "settings.yaml").write_text("seed: 42")
    with open_run("files", run_dir, {}, store_dir) as record:
        record.log_files(run_dir)
        artifact = store_dir / "mlartifacts" / "files" / record.run_id / "artifacts" / "settings.yaml"
        assert artifact.read_text() == "seed: 42"
        artifact.unlink()
        record.log_files(run_dir)
        assert not artifact.exists()
        (run_dir / "settings.yaml").write_text("seed: 43, changed")
        record.log_files(run_dir)
        assert artifact.read_text() == "seed: 43, changed"


def test_store_inside_the_run_folder_is_not_uploaded_into_itself(store_dir: Path, run_dir: Path):
    (store_dir / "report.html").write_text("<p>")
    with open_run("inside", store_dir, {}, store_dir) as record:
        record.log_files(store_dir)
    assert [file.path for file in _client(store_dir).list_artifacts(record.run_id)] == ["report.html"]


@pytest.mark.parametrize(
    ("leaves_with", "status"),
    [
        (None, "FINISHED"),
        (SystemExit(0), "FINISHED"),
        (SystemExit(2), "FAILED"),
        (RuntimeError("CUDA out of memory\nTried to allocate"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (Terminated(), "KILLED"),
    ],
)
def test_status_tells_how_the_run_ended(store_dir: Path, run_dir: Path, leaves_with: BaseException | None, status: str):
    def run() -> None:
        with open_run("status", run_dir, {}, store_dir) as record:
            ids.append(record.run_id)
            if leaves_with is not None:
                raise leaves_with

    ids: list[str] = []
    if leaves_with is None:
        run()
    else:
        with pytest.raises(type(leaves_with)) as caught:
            run()
        assert caught.value is leaves_with
    recorded = _client(store_dir).get_run(ids[0])
    assert recorded.info.status == status
    assert recorded.info.end_time is not None
    expected_error = {"RuntimeError": "RuntimeError: CUDA out of memory", "SystemExit": "SystemExit: 2"}
    assert recorded.data.tags.get("error") == (
        expected_error[type(leaves_with).__name__] if status == "FAILED" else None
    )


WAITING_RUN = """
import signal, sys, time
from pathlib import Path
from qvl.errors import Terminated
from qvl.tracking import open_run

def terminate(*_):
    raise Terminated

signal.signal(signal.SIGTERM, terminate)
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the tests in its background
run_dir = Path(sys.argv[1])
run_dir.mkdir(parents=True)
with open_run("signals", run_dir, {"who": sys.argv[1]}, Path(sys.argv[2])) as record:
    print(record.run_id, flush=True)
    time.sleep(120)
"""


@pytest.fixture(scope="module")
def waiting_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, "subprocess.Popen[str]"]]:
    """Two processes that found no store when they started together, by run id; each waits within its run."""
    folder = tmp_path_factory.mktemp("together")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WAITING_RUN, str(folder / name), str(folder / "new" / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for name in ("one", "two")
    ]
    yield {process.stdout.readline().strip(): process for process in processes}
    for process in processes:
        process.kill()
        process.communicate()


def test_two_processes_may_create_the_store_together(waiting_runs: dict[str, "subprocess.Popen[str]"]):
    for run_id, process in waiting_runs.items():
        assert re.fullmatch("[0-9a-f]{32}", run_id), process.communicate(timeout=10)
    store_dir = Path(next(iter(waiting_runs.values())).args[-1])
    runs = [_client(store_dir).get_run(run_id) for run_id in waiting_runs]
    assert len(runs) == 2
    assert len({run.info.experiment_id for run in runs}) == 1


def test_signals_mark_the_run_killed(waiting_runs: dict[str, "subprocess.Popen[str]"]):
    signals = ((signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143))
    for (run_id, process), (number, exit_code) in zip(waiting_runs.items(), signals, strict=True):
        client = _client(Path(process.args[-1]))
        assert client.get_run(run_id).info.status == "RUNNING"
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert client.get_run(run_id).info.status == "KILLED"
        assert process.returncode == exit_code
        # Python's own last words on Ctrl-C; else nothing, of MLflow's migration logs neither.
        assert errors == "" or (number == signal.SIGINT and errors.startswith("Traceback"))


def test_no_secret_reaches_the_store(store_dir: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    secrets = {
        "HF_TOKEN": "hf_" + "Q" * 30,
        "WANDB_API_KEY": "w4ndb-secret-value",
        "flag": "flag-secret value",
        "param": "param-secret-value",
        "url": "url-secret-value",
        "nested": "nested-secret-value",
        "proxy": "proxy-secret-value",
    }
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, secrets[name])
    command = ["recipe.py", "--hub-token", secrets["flag"], f"--dataset_name=https://me:{secrets['url']}@host/data"]
    monkeypatch.setattr(sys, "argv", command)
    (run_dir / "settings.yaml").write_text(f"hub: {secrets['HF_TOKEN']}\nproxy: http://u:{secrets['proxy']}@p\n")
    params = {
        "hub_token": secrets["param"],
        "hub_kwargs": {"api_key": secrets["nested"]},
        "model": f"https://me:{secrets['url']}@host/model",
        "max_new_tokens": 64,
        "eos_token": "<|im_end|>",
    }
    failure = OSError(f"401 for https://me:{secrets['url']}@host?token={secrets['param']} with {secrets['HF_TOKEN']}")

    def run() -> None:
        with open_run("secrets", run_dir, params, store_dir, {"note": secrets["HF_TOKEN"]}) as record:
            ids.append(record.run_id)
            record.log_files(run_dir)
            record.log_predictions([{"id": "a", "prediction": f"reads {secrets['WANDB_API_KEY']}"}])
            raise failure

    ids: list[str] = []
    with pytest.raises(OSError, match="401"):
        run()
    stored = b"".join(path.read_bytes() for path in store_dir.rglob("*") if path.is_file())
    assert {name: value.encode() in stored for name, value in secrets.items()} == dict.fromkeys(secrets, False)
    run = _client(store_dir).get_run(ids[0])
    assert run.data.params["max_new_tokens"] == "64"
    assert run.data.params["eos_token"] == "<|im_end|>"
    assert run.data.tags["error"].startswith("OSError: 401 for https://")
    # The user's own file is left as it is.
    assert secrets["HF_TOKEN"] in (run_dir / "settings.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--hub_token abc --lora_r 8", f"--hub_token {REDACTED} --lora_r 8"),
        ("--hub_token=abc", f"--hub_token={REDACTED}"),
        ("--hub_token 'a b' -x", f"--hub_token {REDACTED} -x"),
        ('{"api_key": "abc", "n": 1}', f'{{"api_key": "{REDACTED}", "n": 1}}'),
        ("https://host/x?token=abc&rows=2", f"https://host/x?token={REDACTED}&rows=2"),
        ("postgresql://me:pw@host:5432/db", f"postgresql://{REDACTED}@host:5432/db"),
        ("--max_new_tokens 64 --eos_token x", "--max_new_tokens 64 --eos_token x"),
        ("mail me@example.org: a token of love", "mail me@example.org: a token of love"),
    ],
)
def test_redaction_of_text(text: str, expected: str):
    assert redact(text) == expected


def test_redaction_of_settings_keeps_what_is_unset():
    settings = {"hub_token": None, "use_auth_token": False, "password": "x", "layers": ["q", "hf_" + "a" * 24]}
    assert redact(settings) == {
        "hub_token": None,
        "use_auth_token": False,
        "password": REDACTED,
        "layers": ["q", REDACTED],
    }


def test_data_is_not_redacted_by_its_words(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SHORT_TOKEN", "cat")
    assert redact_known_secrets("a cat with a token: gold") == "a cat with a token: gold"


def test_provenance_of_a_script_in_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "recipe.py"
    script.write_text("")
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    monkeypatch.setattr(sys, "argv", [str(script), "--instruction", "two words"])
    tags = provenance_tags()
    assert re.fullmatch(r"[0-9a-f]{40}", tags["git_commit"])
    assert tags["git_dirty"] == "false"
    assert tags["command"].endswith("recipe.py --instruction 'two words'")
    script.write_text("# changed")
    assert provenance_tags()["git_dirty"] == "true"


def test_provenance_without_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "recipe.py"
    script.write_text("")
    monkeypatch.setattr(sys, "argv", [str(script)])
    tags = provenance_tags()
    assert "git_commit" not in tags
    assert "git_dirty" not in tags
    assert tags["gpu"]


def test_secret_flag_with_a_value_of_any_shape(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--hub_token", "-a; b 'c", "--seed", "1"])
    assert command_line().endswith(f"recipe.py --hub_token {REDACTED} --seed 1")


def test_run_of_an_outer_process_is_continued(store_dir: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    with open_run("outer", run_dir, {"learning_rate": 1e-4, "seed": 42}, store_dir) as outer:
        outer.log_predictions([{"id": "a", "finetuned": "old"}])
    monkeypatch.setenv("MLFLOW_RUN_ID", outer.run_id)
    with open_run("outer", run_dir, {"learning_rate": 0.0001, "lora_r": 8}, store_dir) as inner:
        assert _client(store_dir).get_run(outer.run_id).info.status == "RUNNING"
        inner.log_predictions([{"id": "a", "finetuned": "new"}])
    run = _client(store_dir).get_run(outer.run_id)
    assert inner.run_id == outer.run_id
    assert run.data.params == {"learning_rate": "0.0001", "seed": "42", "lora_r": "8"}
    assert _load_table(monkeypatch, store_dir, run.info.experiment_id, outer.run_id)["finetuned"] == ["new"]

    with (
        pytest.raises(UserError, match=r"seed=42, this one has seed=7"),
        open_run("outer", run_dir, {"seed": 7}, store_dir),
    ):
        pass
    assert _client(store_dir).get_run(outer.run_id).info.status == "FINISHED"
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(UserError, match="MLFLOW_RUN_ID"), open_run("outer", run_dir, {}, store_dir):
        pass


def test_what_is_added_to_a_run_leaves_it_as_it_ended(store_dir: Path, run_dir: Path):
    (run_dir / "report.html").write_text("compared")
    with open_run("added", run_dir, {"seed": 42}, store_dir) as first:
        first.log_metrics({"finetuned_bleu4": 0.5})
    client = _client(store_dir)
    before = client.get_run(first.run_id)
    with add_to_run(first.run_id, {"seed": 42, "lora_r": 8}, store_dir) as added:
        assert client.get_run(first.run_id).info.status == "FINISHED"
        added.log_metrics({"baseline_bleu4": 0.25})
        added.log_files(run_dir)

    def fail() -> None:
        with add_to_run(first.run_id, {"seed": 42}, store_dir) as failing:
            failing.log_metrics({"baseline_rouge_l": 0.75})
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    after = client.get_run(first.run_id)
    assert (after.info.to_proto(), after.data.tags, after.data.params) == (
        before.info.to_proto(),
        before.data.tags,
        before.data.params,
    )
    assert after.data.metrics == {"finetuned_bleu4": 0.5, "baseline_bleu4": 0.25, "baseline_rouge_l": 0.75}
    assert [file.path for file in client.list_artifacts(first.run_id)] == ["report.html"]
    with (
        pytest.raises(UserError, match="seed=42, this one has seed=7"),
        add_to_run(first.run_id, {"seed": 7}, store_dir),
    ):
        pass


def test_names_from_the_environment(store_dir: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    monkeypatch.setenv("MLFLOW_RUN_NAME", "evening")
    with open_run("names", run_dir, {}, store_dir) as record:
        pass
    client = _client(store_dir)
    run = client.get_run(record.run_id)
    assert run.info.run_name == "evening"
    assert client.get_experiment(run.info.experiment_id).name == "mine"
    client.delete_experiment(run.info.experiment_id)
    with pytest.raises(UserError, match="'mine' was deleted"), open_run("names", run_dir, {}, store_dir):
        pass


def test_unreachable_server_is_one_line(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:server-password@127.0.0.1:{_free_port()}")
    start = time.monotonic()
    with pytest.raises(UserError) as caught, open_run("down", run_dir, {}, tmp_path):
        pass
    assert time.monotonic() - start < 15
    message = str(caught.value)
    assert "MLFLOW_TRACKING_URI" in message
    assert "refused" in message
    assert "\n" not in message
    assert "server-password" not in message
    assert len(message) < 300


def test_server_that_never_answers_is_given_up(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(UserError, match="timed out"), open_run("silent", run_dir, {}, tmp_path):
            pass


def test_server_has_the_run(server_port: int, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mlflow import MlflowClient

    uri = f"http://127.0.0.1:{server_port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (run_dir / "adapter").mkdir()
    (run_dir / "adapter" / "adapter_config.json").write_text('{"r": 16}')
    with open_run("flickr8k", run_dir, {"lora_r": 16}, tmp_path / "unused") as record:
        record.log_metrics({"loss": 2.5, "bad": math.nan}, step=1)
        record.log_metrics({"loss": 1.5}, step=2)
        record.log_files(run_dir)
        record.log_predictions([{"id": "a", "finetuned": "a cat"}])
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(record.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["lora_r"] == "16"
    assert math.isnan(run.data.metrics["bad"])
    assert [(point.step, point.value) for point in client.get_metric_history(record.run_id, "loss")] == [
        (1, 2.5),
        (2, 1.5),
    ]
    assert {file.path for file in client.list_artifacts(record.run_id)} == {"adapter", "predictions.json"}
    downloaded = client.download_artifacts(record.run_id, "adapter/adapter_config.json", str(tmp_path))
    assert json.loads(Path(downloaded).read_text()) == {"r": 16}
    assert record.run_url == record.ui_command == f"{uri}/#/experiments/{run.info.experiment_id}/runs/{record.run_id}"
    assert not (tmp_path / "unused").exists()


def test_outage_neither_ends_the_run_nor_loses_numbers(
    server_port: int, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from mlflow import MlflowClient

    proxy = Proxy(server_port)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{proxy.port}")
    (run_dir / "metrics.json").write_text("{}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with open_run("outage", run_dir, {}, tmp_path) as record:
            record.log_metrics({"loss": 3.0}, step=0)
            proxy.cut()
            start = time.monotonic()
            for step in range(1, 50):
                record.log_metrics({"loss": 3.0 - step / 50}, step)
            record.log_files(run_dir)
            assert time.monotonic() - start < 15
            proxy.is_cut = False
    messages = [str(warning.message) for warning in caught if "MLflow did not take" in str(warning.message)]
    assert len(messages) == 1
    client = MlflowClient(tracking_uri=f"http://127.0.0.1:{server_port}")
    assert [point.step for point in client.get_metric_history(record.run_id, "loss")] == list(range(50))
    assert client.get_run(record.run_id).info.status == "FINISHED"


def test_server_gone_for_good_leaves_the_exception_alone(
    server_port: int, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    proxy = Proxy(server_port)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{proxy.port}")

    def run() -> None:
        with open_run("gone", run_dir, {}, tmp_path):
            proxy.cut()
            raise ZeroDivisionError

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ZeroDivisionError):
            run()
    assert sum("MLflow did not take" in str(warning.message) for warning in caught) == 1
