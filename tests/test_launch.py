"""The scripts of ``launch/``, run against stand-ins for Slurm, gcloud and GPUs that write down what they are told."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

LAUNCH = pathlib.Path(__file__).resolve().parents[1] / "launch"
SCRIPTS = ["local.sh", "multi_gpu.sh", "slurm.sbatch", "cloud_tpu.sh"]
COMMAND = ["python", "-m", "resnet_jax.main", "--config=digits_20", "--workdir=runs/with space"]
# As the shell prints it.
QUOTED = r"python -m resnet_jax.main --config=digits_20 --workdir=runs/with\ space"

pytestmark = pytest.mark.skipif(not LAUNCH.is_dir() or not shutil.which("bash"), reason="needs launch/ and bash")


def launch(script: str, *arguments: str, path: pathlib.Path | None = None, **variables: str):
    """Runs a script; ``path`` is a folder of stand-ins, found first."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "CUDA_"))}
    environment |= variables
    if path is not None:
        environment["PATH"] = f"{path}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments], env=environment, capture_output=True, text=True, timeout=60
    )


def stand_in(folder: pathlib.Path, name: str, body: str = "") -> None:
    """A program that appends its arguments, one line a call, to ``calls`` and then does ``body``."""
    file = folder / name
    file.write_text(f'#!/bin/bash\necho {name} "$@" >> {folder}/calls\n{body}\n')
    file.chmod(0o755)


def calls(folder: pathlib.Path) -> list[str]:
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_has_nothing_to_say(script):
    beside = pathlib.Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("no shellcheck")
    done = subprocess.run([shellcheck, "--shell=bash", str(LAUNCH / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_a_page_stop_at_errors_and_have_a_help(script):
    text = (LAUNCH / script).read_text()
    assert len(text.splitlines()) <= 120
    assert max(map(len, text.splitlines())) <= 120
    assert "set -euo pipefail" in text
    assert os.access(LAUNCH / script, os.X_OK)
    done = launch(script, "--help")
    assert done.returncode == 0
    assert script in done.stdout
    assert "--dry-run" in done.stdout
    assert script in (LAUNCH / "README.md").read_text()


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "said"),
    [
        ("local.sh", [], {}, "number of processes"),
        ("local.sh", ["0", "true"], {}, "'0' is no number of processes"),
        ("local.sh", ["python", "-m", "x"], {}, "'python' is no number"),
        ("local.sh", ["2"], {}, "no command"),
        ("local.sh", ["2", "true"], {"DEVICES": "many"}, "DEVICES=many"),
        ("local.sh", ["2", "true"], {"GPUS": "0,1,2"}, "3 GPUs for 2 processes"),
        ("multi_gpu.sh", [], {"CUDA_VISIBLE_DEVICES": "0,1"}, "no command"),
        ("multi_gpu.sh", ["true"], {"CUDA_VISIBLE_DEVICES": ""}, "no GPU"),
        ("slurm.sbatch", [], {"SLURM_JOB_ID": "7"}, "no command"),
        ("slurm.sbatch", ["true"], {}, "not in a Slurm job"),
        ("slurm.sbatch", ["true"], {"SLURM_JOB_ID": "7", "MAX_RESTARTS": "ten"}, "MAX_RESTARTS=ten"),
        ("cloud_tpu.sh", ["destroy", "pod"], {"ZONE": "z"}, "'destroy' is none of create"),
        ("cloud_tpu.sh", ["create"], {"ZONE": "z"}, "'' is no name"),
        ("cloud_tpu.sh", ["create", "My_Pod"], {"ZONE": "z"}, "'My_Pod' is no name"),
        ("cloud_tpu.sh", ["create", "pod"], {}, "ZONE is not set"),
        ("cloud_tpu.sh", ["create", "pod"], {"ZONE": "z"}, "TYPE is not set"),
        ("cloud_tpu.sh", ["create", "pod"], {"ZONE": "z", "TYPE": "v99-8"}, "TYPE=v99-8"),
        ("cloud_tpu.sh", ["run", "pod"], {"ZONE": "z"}, "no command"),
        ("cloud_tpu.sh", ["delete", "pod", "x"], {"ZONE": "z"}, "delete takes no command"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(script, arguments, variables, said, tmp_path):
    for name in ("gcloud", "srun", "scontrol"):
        stand_in(tmp_path, name)
    done = launch(script, *arguments, path=tmp_path, **variables)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert calls(tmp_path) == []


# local.sh


def python(code: str) -> list[str]:
    """A process; what it says should be written at once, since all share an output."""
    return [sys.executable, "-c", "import os, signal, sys, time\n" + code]


def test_local_dry_run_prints_every_process():
    done = launch("local.sh", "--dry-run", "2", *COMMAND, DEVICES="4", XLA_FLAGS="--a=b", JAX_PLATFORMS="")
    assert done.returncode == 0
    first, second = done.stdout.splitlines()
    port = first.split("127.0.0.1:")[1].split()[0]
    assert 1024 < int(port) < 32768
    for i, line in enumerate((first, second)):
        assert line.startswith(r"env JAX_PLATFORMS=cpu XLA_FLAGS=--a=b\ --xla_force_host_platform_device_count=4 ")
        assert f"{QUOTED} --coordinator=127.0.0.1:{port} --num_processes=2 --process_id={i}" in line


def test_local_runs_n_processes_with_their_flags_and_prefixes_all_but_the_first(tmp_path):
    show = 'os.write(1, f\'{sys.argv[1:]} {os.environ["JAX_PLATFORMS"]} {"XLA_FLAGS" in os.environ}\\nend\'.encode())'
    done = launch("local.sh", "3", *python(show), "--x=a b", JAX_PLATFORMS="")
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.replace("end", "end\n").split("\n")  # Process 0's "end" has no line of its own.
    (port,) = {line.split("127.0.0.1:")[1].split("'")[0] for line in lines if "127.0.0.1" in line}
    flags = f"['--x=a b', '--coordinator=127.0.0.1:{port}', '--num_processes=3', '--process_id="
    ends = os.environ.get("XLA_FLAGS") is not None
    for i, prefix in enumerate(("", "[1] ", "[2] ")):
        assert f"{prefix}{flags}{i}'] cpu {ends}" in lines
    assert {"[1] end", "[2] end"} <= set(lines)


def test_local_prefixes_what_the_others_say_to_stderr():
    done = launch("local.sh", "2", *python("print('oops', sys.argv[-1][-1], file=sys.stderr)"))
    assert done.stderr == "oops 0\n"
    assert done.stdout == "[1] oops 1\n"


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [((0, 0), 0), ((2, 2), 2), ((0, 1), 1), ((75, 75), 75), ((69, 75, 0), 75), ((1, 75), 75), ((69, 1), 69),
     ((0, -9), 137)],
)  # fmt: skip
def test_locals_status_is_75_if_one_was_preempted_else_the_highest(statuses, expected):
    code = f"""
status = {statuses}[int(sys.argv[-1].split("=")[1])]
os.kill(os.getpid(), -status) if status < 0 else sys.exit(status)"""
    assert launch("local.sh", str(len(statuses)), *python(code)).returncode == expected


def start_sleepers(tmp_path: pathlib.Path, handler: str, **options) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """local.sh with two processes that write down their ids and wait, and those processes."""
    code = f"""
{handler}
index = sys.argv[-1].split("=")[1]
child = os.fork()  # A data worker, say.
if child == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
open(os.path.join({str(tmp_path)!r}, index + ("child" if child == 0 else "parent")), "w").write(str(os.getpid()))
time.sleep(60)"""
    # Where these tests were started by "&" in a script, SIGINT is ignored, and Bash could not trap it.
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])"
    launcher = subprocess.Popen(
        [sys.executable, "-c", heed, "bash", str(LAUNCH / "local.sh"), "2", *python(code)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip
    files = [tmp_path / f"{i}{kind}" for i in (0, 1) for kind in ("parent", "child")]
    deadline = time.monotonic() + 30
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline, "the processes did not start"
        time.sleep(0.02)
    return launcher, [psutil.Process(int(file.read_text())) for file in files]


def gone(processes: list[psutil.Process]) -> bool:
    psutil.wait_procs(processes, timeout=10)
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_sends_signals_on_waits_and_leaves_nobody_behind(tmp_path, number):
    # As main.py does: says so, saves for a moment, exits with a status of its own.
    handler = f"""
def save(number, frame):
    os.write(1, b"got %d\\n" % number)
    time.sleep(0.3)
    os._exit(75)
signal.signal({int(number)}, save)"""
    launcher, processes = start_sleepers(tmp_path, handler)
    launcher.send_signal(number)
    output, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 75
    assert sorted(output.splitlines()) == [f"[1] got {int(number)}", f"got {int(number)}"]
    assert gone(processes)


def test_a_process_without_a_handler_ends_by_the_signal_as_it_would_alone(tmp_path):
    launcher, processes = start_sleepers(tmp_path, "signal.signal(signal.SIGINT, signal.SIG_DFL)")
    launcher.send_signal(signal.SIGINT)
    launcher.communicate(timeout=30)
    assert launcher.returncode == 130
    assert gone(processes)


def test_ctrl_c_reaches_each_process_once(tmp_path):
    # A terminal signals the whole foreground group; a second Ctrl-C would stop a run without saving.
    handler = """
times = []
def count(number, frame):
    times.append(number)
    if len(times) == 1:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
signal.signal(signal.SIGINT, count)
signal.signal(signal.SIGALRM, lambda *_: os._exit(len(times)))"""
    launcher, processes = start_sleepers(tmp_path, handler, start_new_session=True)
    os.killpg(launcher.pid, signal.SIGINT)
    launcher.communicate(timeout=30)
    assert launcher.returncode == 1
    assert gone(processes)


# multi_gpu.sh


def test_multi_gpu_gives_each_process_a_gpu_of_its_own():
    done = launch("multi_gpu.sh", "--dry-run", *COMMAND, CUDA_VISIBLE_DEVICES="2,5,7")
    assert done.returncode == 0
    assert "one process for all 3" in done.stderr
    lines = done.stdout.splitlines()
    for i, (gpu, line) in enumerate(zip((2, 5, 7), lines, strict=True)):
        assert line.startswith(f"env CUDA_VISIBLE_DEVICES={gpu} {QUOTED} --coordinator=127.0.0.1:")
        assert line.rstrip().endswith(f"--num_processes=3 --process_id={i}")


def test_multi_gpu_takes_all_of_the_machine_and_runs(tmp_path):
    stand_in(tmp_path, "nvidia-smi", "printf '0\\n1\\n'")
    show = "os.write(1, f'{os.environ[\"CUDA_VISIBLE_DEVICES\"]} {sys.argv[-1]}\\n'.encode())"
    done = launch("multi_gpu.sh", *python(show), path=tmp_path)
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["0 --process_id=0", "[1] 1 --process_id=1"]


def test_multi_gpu_says_that_one_process_is_enough_for_one_gpu():
    done = launch("multi_gpu.sh", *python("print(sys.argv[1:]); sys.exit(3)"), "--x", CUDA_VISIBLE_DEVICES="4")
    assert (done.returncode, done.stdout) == (3, "['--x']\n")
    assert "one process is enough" in done.stderr


# slurm.sbatch


def job(folder: pathlib.Path, status: int, **variables: str) -> tuple[subprocess.CompletedProcess, list[str]]:
    """The job whose processes end with ``status``: what the script did, and the requeues among it."""
    stand_in(folder, "srun", f"exit {status}")
    stand_in(folder, "scontrol")
    done = launch("slurm.sbatch", *COMMAND, path=folder, SLURM_JOB_ID="4711", **variables)
    first, *rest = calls(folder)
    assert first == "srun --kill-on-bad-exit=0 " + " ".join(COMMAND)
    assert done.returncode == status
    return done, rest


@pytest.mark.parametrize(
    ("status", "restarts", "again"),
    [(0, "0", False), (1, "0", False), (2, "0", False), (130, "0", False), (75, "0", True), (75, "500", True),
     (69, "0", True), (69, "9", True), (69, "10", False), (134, "0", True), (137, "9", True), (137, "10", False)],
)  # fmt: skip
def test_slurm_requeues_what_was_preempted_and_what_lost_a_peer_ten_times(tmp_path, status, restarts, again):
    done, rest = job(tmp_path, status, SLURM_RESTART_COUNT=restarts)
    assert rest == (["scontrol requeue 4711"] if again else [])
    assert ("back into the queue" in done.stdout) == again
    assert ("restarts are used up" in done.stderr) == (status in (69, 134, 137, 139) and not again)


def test_slurms_first_start_has_no_restart_count_and_the_limit_is_a_setting(tmp_path):
    assert job(tmp_path, 69)[1] == ["scontrol requeue 4711"]
    (tmp_path / "calls").unlink()
    assert job(tmp_path, 69, SLURM_RESTART_COUNT="2", MAX_RESTARTS="2")[1] == []


def test_slurm_passes_the_cpus_of_a_task_on(tmp_path):
    stand_in(tmp_path, "srun")
    launch("slurm.sbatch", "true", path=tmp_path, SLURM_JOB_ID="1", SLURM_CPUS_PER_TASK="64")
    assert calls(tmp_path) == ["srun --kill-on-bad-exit=0 --cpus-per-task=64 true"]


def test_slurms_shell_outlives_a_sigterm_and_sees_how_the_processes_end(tmp_path):
    stand_in(tmp_path, "srun", "kill -TERM $PPID; sleep 0.3; exit 75")
    stand_in(tmp_path, "scontrol")
    done = launch("slurm.sbatch", "true", path=tmp_path, SLURM_JOB_ID="1")
    assert done.returncode == 75
    assert calls(tmp_path) == ["srun --kill-on-bad-exit=0 true", "scontrol requeue 1"]


def test_slurms_directives_signal_the_processes_and_keep_the_output_of_every_start(tmp_path):
    for name in ("srun", "scontrol"):
        stand_in(tmp_path, name)
    done = launch("slurm.sbatch", "--dry-run", *COMMAND, path=tmp_path, SLURM_JOB_ID="4711")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=TERM@300"} <= set(lines)
    assert f"srun --kill-on-bad-exit=0 {QUOTED} " in lines
    assert lines[-1].startswith("scontrol requeue 4711")
    assert calls(tmp_path) == []
    # sbatch reads directives only ahead of the first command.
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert text.rindex("#SBATCH --") < text.index("set -euo")


# cloud_tpu.sh

TPU = {"ZONE": "us-central1-a", "TYPE": "v5litepod-16", "POLL": "0"}
WHERE = "--zone=us-central1-a --quiet"


def test_cloud_tpu_dry_run_prints_all_commands_and_runs_none(tmp_path):
    for name in ("gcloud", "git"):
        stand_in(tmp_path, name)
    done = launch(
        "cloud_tpu.sh", "--dry-run", "up", "pod", *COMMAND, path=tmp_path, SPOT="1", SETUP="mount data", **TPU
    )
    assert done.returncode == 0, done.stderr
    assert calls(tmp_path) == []
    create, archive, copy, install, run, log = done.stdout.splitlines()
    assert create.rstrip() == (
        f"gcloud compute tpus queued-resources create pod --node-id=pod {WHERE}"
        " --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot"
    )
    assert archive.startswith("git -C ")
    assert copy.startswith("gcloud compute tpus tpu-vm scp ")
    assert "--worker=all" in copy
    for line, part in ((install, "constraints.txt"), (install, "mount data"), (run, "resnet_jax.main"), (log, "tail")):
        assert line.startswith(f"gcloud compute tpus tpu-vm ssh pod {WHERE} --worker=")
        assert part in line
    assert "--worker=all" in install
    assert "--worker=all" in run
    assert "--worker=0" in log


@pytest.mark.parametrize(
    ("kind", "version"),
    [("v4-32", "tpu-ubuntu2204-base"), ("v5p-32", "v2-alpha-tpuv5"), ("v6e-16", "v2-alpha-tpuv6e")],
)
def test_cloud_tpu_knows_the_runtimes_of_the_types(kind, version):
    done = launch("cloud_tpu.sh", "--dry-run", "create", "pod", **TPU | {"TYPE": kind, "PROJECT": "mine"})
    assert f"--accelerator-type={kind} --runtime-version={version} " in done.stdout
    assert "--spot" not in done.stdout
    assert "--project=mine" in done.stdout
    done = launch("cloud_tpu.sh", "--dry-run", "create", "pod", **TPU | {"TYPE": kind, "VERSION": "other"})
    assert "--runtime-version=other " in done.stdout


def test_cloud_tpu_waits_until_the_slice_is_there(tmp_path):
    states = 'n=$(grep -c describe "$(dirname "$0")/calls"); [[ $* != *describe* ]] || '
    stand_in(tmp_path, "gcloud", states + "{ [[ $n -lt 3 ]] && echo WAITING_FOR_RESOURCES || echo ACTIVE; }")
    done = launch("cloud_tpu.sh", "create", "pod", path=tmp_path, **TPU)
    assert done.returncode == 0, done.stderr
    create, *describes = calls(tmp_path)
    assert "queued-resources create pod" in create
    assert describes == [f"gcloud compute tpus queued-resources describe pod {WHERE} --format=value(state.state)"] * 3


@pytest.mark.parametrize("body", ["[[ $* != *describe* ]] || echo FAILED", "[[ $* != *create* ]]"])
def test_cloud_tpu_goes_no_further_without_the_slice(tmp_path, body):
    stand_in(tmp_path, "gcloud", body)
    done = launch("cloud_tpu.sh", "up", "pod", *COMMAND, path=tmp_path, **TPU)
    assert done.returncode != 0
    assert not any("ssh" in call or "scp" in call for call in calls(tmp_path))


def test_cloud_tpu_deletes_the_request_with_the_slice(tmp_path):
    stand_in(tmp_path, "gcloud")
    assert launch("cloud_tpu.sh", "delete", "pod", path=tmp_path, **TPU).returncode == 0
    assert calls(tmp_path) == [f"gcloud compute tpus queued-resources delete pod {WHERE} --force"]


def test_cloud_tpu_stops_a_run_by_sigterm_on_all_hosts():
    # Not run here: it would find other runs on this machine.
    done = launch("cloud_tpu.sh", "--dry-run", "stop", "pod", **TPU)
    assert f"ssh pod {WHERE} --worker=all --command=pkill" in done.stdout
    assert "-TERM" in done.stdout


def test_cloud_tpu_hosts_run_detached_and_once_at_a_time(tmp_path):
    if not shutil.which("flock") or not shutil.which("setsid"):
        pytest.skip("no flock or setsid here")
    # gcloud as a host would act on it: the command, in a shell, in a home of its own.
    home = tmp_path / "home"
    (home / "resnet_jax/.venv/bin").mkdir(parents=True)
    (home / "resnet_jax/.venv/bin/activate").write_text("")
    host = f'[[ $a != --command=* ]] || {{ cd {home}; HOME={home} bash -c "${{a#--command=}}"; }}'
    stand_in(tmp_path, "gcloud", f'for a in "$@"; do {host}; done')
    code = "print(sys.argv[1:], flush=True); time.sleep(1.5); sys.exit(75)"
    started = time.monotonic()
    done = launch("cloud_tpu.sh", "run", "pod", *python(code), "a 'b' $c", path=tmp_path, **TPU)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 1.4, "run must not wait for the run's end"
    again = launch("cloud_tpu.sh", "run", "pod", "true", path=tmp_path, **TPU)
    assert again.returncode == 1
    assert "a run is going on here" in again.stdout
    log = launch("cloud_tpu.sh", "log", "pod", path=tmp_path, **TPU)
    assert log.stdout.splitlines() == ["[\"a 'b' $c\"]", "exit status 75"]


# gke.yaml


def test_gke_is_a_jobset_that_restarts_as_the_exit_statuses_say():
    manifest = yaml.safe_load((LAUNCH / "gke.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 10
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["backoffLimit"], job["completionMode"]) == (0, "Indexed")
    assert job["completions"] == job["parallelism"]
    exits, conditions = job["podFailurePolicy"]["rules"]
    assert (exits["action"], exits["onExitCodes"]["operator"], exits["onExitCodes"]["values"]) == (
        "FailJob",
        "In",
        [75],
    )
    assert (conditions["action"], conditions["onPodConditions"][0]["type"]) == ("FailJob", "DisruptionTarget")

    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert exits["onExitCodes"]["containerName"] == container["name"]
    assert pod["restartPolicy"] == "Never"  # A podFailurePolicy asks for it.
    assert pod["terminationGracePeriodSeconds"] >= 60
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    rows, columns = map(int, topology.split("x"))
    assert rows * columns == job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (script,) = container["args"]
    assert "exec python -m resnet_jax.main" in script  # The signal must reach Python.
    assert "--workdir=gs://" in script
    assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0


@pytest.mark.parametrize(
    "script",
    [
        ("local.sh", "2"),
        ("multi_gpu.sh", "--dry-run"),
        ("slurm.sbatch", "--dry-run"),
        ("cloud_tpu.sh", "up", "pod"),
        ("cloud_tpu.sh", "run", "pod"),
    ],
)
def test_an_option_in_the_command_s_place_is_refused_before_it_costs_anything(script):
    name, *first = script
    command = ["bash", str(LAUNCH / name), *first, "--dry-run", "python", "-m", "resnet_jax.main"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"ZONE": "z"}, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no command" in done.stderr
    assert len(done.stderr.splitlines()) == 1
