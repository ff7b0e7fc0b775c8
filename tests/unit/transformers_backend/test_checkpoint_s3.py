"""Checkpoints on S3, on a local server: a run saves beside training, is resumed, and cleans up after a killed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from tests.jobs import tiny_job

pytest.importorskip("s3fs", reason="s3fs is not installed")

# In a process of its own: s3fs keeps an event loop and sockets until the interpreter ends.
PROGRAM = """
import json, sys
import s3fs, torch
from transformers_backend import Trainer, load_job_config

torch.set_num_threads(1)
s3 = s3fs.S3FileSystem()

def run(*options):
    try:
        trainer = Trainer(load_job_config([sys.argv[1], *options]))
    except (ValueError, OSError) as error:
        return str(error)
    first = trainer.step
    trainer.train()
    trainer.close()
    weights = {name: value.double().sum().item() for name, value in trainer.model.full_state_dict().items()}
    return {"first": first, "steps": trainer.checkpointer and trainer.checkpointer.steps(), "weights": weights}

said = {}
s3.mkdir("bucket")
said["whole"] = run("--checkpoint.enable=false", "--job.dump_folder", sys.argv[2])
said["first"] = run("--training.steps", "4")
s3.pipe("bucket/some/run/step-9/.incomplete", b"")
s3.pipe("bucket/some/run/step-9/.metadata", b"half")
said["resumed"] = run()
said["back"] = run("--checkpoint.load_step", "4", "--training.steps", "5")
s3.pipe("bucket/some/run/step-5/__0_0.distcp", b"short")
said["damaged"] = run("--checkpoint.load_step", "5")
said["missing"] = run("--checkpoint.folder", "s3://no-such-bucket/run")
s3.invalidate_cache()
said["files"] = s3.find("bucket")
print(json.dumps(said))
"""


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """AWS's own variables, which point at the server."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        **os.environ, "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }  # fmt: skip
    server.stop()


def test_a_run_is_saved_to_s3_and_resumed_from_there(environment: dict[str, str], tmp_path: Path):
    (tmp_path / "text").mkdir()
    for number in range(6):
        text = "".join(f"{number}: line {line} of some text\n" for line in range(12))
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    config = tiny_job(
        tmp_path, "run", lr_scheduler__total_steps=6, checkpoint__enable=True, checkpoint__interval=1,
        checkpoint__folder="s3://bucket/some/run", checkpoint__async_mode="async", checkpoint__keep_latest_k=3,
    )  # fmt: skip
    config.save(tmp_path / "job.toml")
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "job.toml"), str(tmp_path / "whole")],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout.splitlines()[-1])
    assert said["first"]["steps"] == [2, 3, 4]
    assert (said["resumed"]["first"], said["resumed"]["steps"]) == (4, [4, 5, 6])
    assert said["resumed"]["weights"] == said["whole"]["weights"]
    assert (said["back"]["first"], said["back"]["steps"]) == (4, [4, 5])
    assert "s3://bucket/some/run/step-5 is damaged: __0_0.distcp has 5 bytes of" in said["damaged"]
    assert "s3://no-such-bucket/run: The specified bucket does not exist" in said["missing"]
    folders = {path.split("/")[3] for path in said["files"]}
    assert folders == {"step-4", "step-5", "step-6"}, "6 is set aside in place, 9 was cleaned up"
    assert "bucket/some/run/step-6/.abandoned" in said["files"]
    assert "bucket/some/run/step-4/config.toml" in said["files"]
