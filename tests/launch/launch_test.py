"""The launchers: their commands, their failures, and what they do when a slice is lost. Clouds are stand-ins here."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.support.checks import present
from tests.support.paths import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = (*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", ROOT / "tests/launch/slurm_node.sh")

SETTINGS = {
    "worker.sh": {"CONFIG": "configs/smoke.py", "WORKDIR": "/shared/run"},
    "slurm.sbatch": {"CONFIG": "configs/smoke.py", "WORKDIR": "/shared/run"},
    "tpu_pod.sh": {
        "TPU_NAME": "scalr",
        "ZONE": "us-east5-a",
        "ACCELERATOR_TYPE": "v5p-128",
        "RUNTIME_VERSION": "v2-alpha-tpuv5",
        "REPOSITORY": "https://example.org/scalr_jax.git",
        "REVISION": "0123abc",
        "CONFIG": "configs/smoke.py",
        "WORKDIR": "/shared/run",
    },
    "gke.sh": {
        "NAME": "scalr",
        "IMAGE": "images.example.org/scalr_jax:1",
        "TPU": "tpu-v5p-slice",
        "TOPOLOGY": "4x4x8",
        "VOLUME_CLAIM": "shared",
        "CONFIG": "configs/smoke.py",
        "WORKDIR": "/shared/run",
    },
}


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)


def launch(name, *arguments, tools=None, **settings):
    """Run a launcher with nothing in the environment but `settings`, and the folder `tools` first on the path."""
    path = os.environ["PATH"] if tools is None else f"{tools}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", LAUNCH / name, *arguments],
        cwd=ROOT,
        env={"PATH": path, "HOME": os.environ.get("HOME", "/"), **settings},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        start_new_session=True,
    )


@pytest.fixture
def untouchable(tmp_path):
    """A folder of cluster tools each of which leaves a mark and fails."""
    for name in ("gcloud", "kubectl", "srun", "sbatch", "scancel", "scontrol"):
        write_script(tmp_path / "tools" / name, f"touch {tmp_path}/touched\nexit 1\n")
    yield tmp_path / "tools"
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_finds_nothing(script):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "shellcheck is missing; it comes with the test extra"
    result = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert "\nset -euo pipefail\n" in script.read_text()


@pytest.mark.parametrize("name", ["slurm.sbatch", "tpu_pod.sh", "gke.sh"])
def test_help_lists_every_setting(name, untouchable):
    result = launch(name, "--help", tools=untouchable)
    assert result.returncode == 0
    assert all(setting in result.stdout for setting in SETTINGS[name])
    assert "set -euo" not in result.stdout


@pytest.mark.parametrize(
    ("name", "missing"), [(name, key) for name, settings in SETTINGS.items() for key in settings if key != "REVISION"]
)
def test_a_missing_setting_is_named_in_one_sentence(name, missing, untouchable):
    settings = {key: value for key, value in SETTINGS[name].items() if key != missing}
    result = launch(name, *([] if name == "worker.sh" else ["--dry-run"]), tools=untouchable, **settings)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"{name}: error: set {missing} to ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("tpu_pod.sh", {"TPU_NAME": "My TPU"}, "TPU_NAME"),
        ("tpu_pod.sh", {"WORKDIR": "runs/a"}, "full path"),
        ("tpu_pod.sh", {"SLICES": "two"}, "SLICES=two"),
        ("tpu_pod.sh", {"MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1"),
        ("gke.sh", {"TOPOLOGY": "128"}, "TOPOLOGY"),
        ("gke.sh", {"TOPOLOGY": "2x3", "CHIPS_PER_HOST": "4"}, "6 chips"),
        ("gke.sh", {"TOPOLOGY": "2x2x1", "SLICES": "2"}, "several hosts"),
        ("gke.sh", {"WORKDIR": "/elsewhere/run"}, "under /shared"),
        ("gke.sh", {"RUN_AS": "0"}, "RUN_AS=0"),
        ("tpu_pod.sh", {"REPOSITORY": "https://s3cret@example.org/a.git"}, "SETUP"),
        ("tpu_pod.sh", {"REPOSITORY": "https://me:s3cret@example.org/a.git"}, "SETUP"),
        ("tpu_pod.sh", {"REPOSITORY": "ssh://me:s3cret@example.org/a.git"}, "SETUP"),
        ("tpu_pod.sh", {"REPOSITORY": "https://example.org/a.git?token=s3cret"}, "SETUP"),
        ("slurm.sbatch", {"SLURM_GPUS_PER_TASK": "1"}, "--gpus-per-node"),
        ("slurm.sbatch", {"SLURM_GPUS_ON_NODE": "4"}, "--ntasks-per-node=4"),
    ],
)
def test_a_wrong_setting_is_refused(name, wrong, words, untouchable):
    result = launch(name, "--dry-run", tools=untouchable, **{**SETTINGS[name], **wrong})
    assert result.returncode == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert "s3cret" not in result.stdout + result.stderr


def test_a_repository_may_be_read_as_a_user_without_a_password(untouchable):
    for repository in ("ssh://git@example.org/a.git", "git@example.org:a.git"):
        settings = {**SETTINGS["tpu_pod.sh"], "REPOSITORY": repository}
        assert repository in launch("tpu_pod.sh", "--dry-run", tools=untouchable, **settings).stdout


# ---- TPU slices


def commands(output):
    """The words of each command of a dry run, read by bash, whose $'...' shlex does not know."""
    script = 'gcloud() { printf "%s\\0" gcloud "$@"; printf "\\n\\0"; }\n' + output
    text = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    return [part.split("\0")[:-1] for part in text.split("\n\0")[:-1]]


def remote(command):
    """The line that a gcloud command has workers run."""
    return next(word.removeprefix("--command=") for word in command if word.startswith("--command="))


def test_tpu_pod_dry_run_shows_each_command(untouchable):
    result = launch(
        "tpu_pod.sh",
        *("--dry-run", "--clean-up", "--config.data.root=/a b"),
        tools=untouchable,
        SPOT="1",
        SLICES="2",
        PROJECT="mine",
        CREATE_FLAGS="--network=net --reserved",
        SETUP="mount /shared",
        **SETTINGS["tpu_pod.sh"],
    )
    assert result.returncode == 0, result.stderr
    shown = commands(result.stdout)
    assert all(command[:4] == ["gcloud", "compute", "tpus", "queued-resources"] for command in shown)
    assert all({"--zone=us-east5-a", "--project=mine", "--quiet"} <= set(command) for command in shown)
    assert [command[4] for command in shown] == ["list", "create", "ssh", "ssh", "ssh", "ssh", "delete"]
    _, create, install, start, follow, _, delete = shown
    assert {"--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5"} <= set(create)
    assert {"--node-count=2", "--node-prefix=scalr", "--spot", "--network=net", "--reserved"} <= set(create)
    assert all({"--node=all", "--worker=all"} <= set(command) for command in (install, start))
    assert {"--node=0", "--worker=0"} <= set(follow)
    order = [remote(install).index(step) for step in ("mount /shared", "git clone", "0123abc", "[tpu]")]
    assert order == sorted(order)
    assert "CONFIG=configs/smoke.py WORKDIR=/shared/run" in remote(start)
    assert r"--config.data.root=/a\ b" in remote(start)
    assert delete[5:7] == ["scalr", "--force"]


def test_tpu_pod_one_slice_has_one_node_and_delete_needs_no_more_than_a_name(untouchable):
    settings = SETTINGS["tpu_pod.sh"]
    create = commands(launch("tpu_pod.sh", "--dry-run", tools=untouchable, **settings).stdout)[1]
    assert "--node-id=scalr" in create
    assert not any(word.startswith(("--node-count", "--spot")) for word in create)
    result = launch("tpu_pod.sh", "--dry-run", "--delete", tools=untouchable, TPU_NAME="scalr", ZONE="us-east5-a")
    assert [command[4:7] for command in commands(result.stdout)] == [["delete", "scalr", "--force"]]


@pytest.fixture
def repository(tmp_path):
    """launch/ under Git, with what REVISION says."""
    source = tmp_path / "source"
    shutil.copytree(LAUNCH, source / "launch")
    git = ["git", "-C", source, "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "launch"], ["commit", "-qm", "all"], ["tag", "0123abc"]):
        subprocess.run([*git, *words], check=True)
    return str(source)


@pytest.fixture
def cloud(tmp_path, repository):
    """A stand-in for gcloud whose one worker is this machine with another home; `train` stands in for the training.

    Returns `run(train, **settings)` -> (result, the verbs that gcloud was asked for, without ssh).
    """
    folder = tmp_path / "cloud"
    write_script(
        tmp_path / "tools/gcloud",
        f"""cloud={folder}
echo "$4" >>$cloud/calls
case $4 in
list) # the states still to come, one a look
    head -n 1 $cloud/states
    (($(wc -l <$cloud/states) < 2)) || sed -i 1d $cloud/states ;;
create) mkdir -p $cloud/home; printf "%s\\n" WAITING_FOR_RESOURCES ACTIVE >$cloud/states ;;
delete) rm -rf $cloud/home; : >$cloud/states ;;
ssh)
    [[ $(head -n 1 $cloud/states) == ACTIVE ]] || exit 255
    for word; do [[ $word != --command=* ]] || command=${{word#--command=}}; done
    HOME=$cloud/home CLOUD=$cloud LAUNCHER=$PPID bash -c "cd; $command" ;;
esac
""",
    )
    folder.mkdir()
    (folder / "states").touch()

    def run(train, *arguments, **settings):
        write_script(tmp_path / "train", train)
        install = f"mkdir -p .venv/bin; ln -sf {tmp_path}/train .venv/bin/python"
        mine = {**SETTINGS["tpu_pod.sh"], "REPOSITORY": repository, "INSTALL": install, "POLL_SECONDS": "1"}
        mine["WORKDIR"] = str(tmp_path / "shared/run")
        (tmp_path / "shared/run").mkdir(parents=True, exist_ok=True)
        result = launch("tpu_pod.sh", *arguments, tools=tmp_path / "tools", **{**mine, **settings})
        return result, [call for call in (folder / "calls").read_text().split() if call not in ("list", "ssh")]

    return run


# What the stand-ins for the training begin with: WORKDIR is that of worker.sh.
ATTEMPT = 'echo x >>"$WORKDIR/attempts"; attempt=$(wc -l <"$WORKDIR/attempts"); echo "attempt $attempt: $*"\n'
FINISH = 'echo {} >"$WORKDIR/results.json"\n'


def test_a_preempted_slice_is_asked_for_again_and_the_run_goes_on(cloud):
    preempted_first = ATTEMPT + (
        'if ((attempt == 1)); then echo SUSPENDED >"$CLOUD/states"; kill -KILL 0; fi\n' + FINISH  # its process group
    )
    result, verbs = cloud(preempted_first, "--clean-up", "--config.seed=1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert verbs == ["create", "delete", "create", "delete"]
    assert "WAITING_FOR_RESOURCES for 0 minutes" in result.stdout
    assert "SUSPENDED: it is deleted and asked for again" in result.stdout
    assert "attempt 2: -m scalr_jax.main --config=configs/smoke.py" in result.stdout
    assert result.stdout.rstrip().endswith("the run is finished")


@pytest.mark.slow
def test_a_run_that_was_stopped_and_saved_is_started_again_on_the_same_slice(cloud):
    result, verbs = cloud(ATTEMPT + "((attempt == 1)) ||" + FINISH)
    assert result.returncode == 0, result.stdout + result.stderr
    assert verbs == ["create"]
    assert "has saved; it is started again" in result.stdout
    # And once more, on the slice that is there: nothing is left to do.
    result, verbs = cloud("exit 0")
    assert result.returncode == 0, result.stdout + result.stderr
    assert verbs == ["create"]


@pytest.mark.parametrize(("code", "ends", "attempts"), [(2, 2, 1), (1, 1, 2)])
def test_bad_input_is_not_tried_again_and_a_failing_run_not_for_ever(code, ends, attempts, cloud, tmp_path):
    result, verbs = cloud(ATTEMPT + f"echo what is wrong; exit {code}\n", MAX_RESTARTS="1")
    assert result.returncode == ends, result.stdout + result.stderr
    assert len((tmp_path / "shared/run/attempts").read_text().splitlines()) == attempts
    assert "what is wrong" in result.stdout
    assert "--delete removes them" in result.stderr
    assert verbs == ["create"]


def test_workers_that_cannot_be_reached_cost_no_slice(cloud):
    """The slice may have taken days to get: a failing installation or connection never deletes it."""
    result, verbs = cloud(FINISH, INSTALL="echo no disk space; false", MAX_RESTARTS="1")
    assert result.returncode == 1
    assert "no disk space" in result.stdout
    assert verbs == ["create"]


@pytest.mark.slow
def test_a_run_that_goes_on_without_the_launcher_is_followed(cloud, tmp_path):
    """The launcher ends, as when its connection breaks; the same command finds the run and starts no other."""
    breaks = ATTEMPT + 'sleep 1; kill -KILL -- "-$(cat "$CLOUD/launcher")"; sleep 5\n' + FINISH
    result, _ = cloud(breaks, SETUP='echo "$LAUNCHER" >"$CLOUD/launcher"')
    assert result.returncode == -9, result.stdout + result.stderr
    result, verbs = cloud(breaks)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the run is still going" in result.stdout
    assert len((tmp_path / "shared/run/attempts").read_text().splitlines()) == 1
    assert verbs == ["create"]


def test_installing_ends_what_an_earlier_attempt_left(repository, untouchable, tmp_path):
    settings = {**SETTINGS["tpu_pod.sh"], "REPOSITORY": repository, "INSTALL": "true"}
    install = remote(commands(launch("tpu_pod.sh", "--dry-run", tools=untouchable, **settings).stdout)[2])
    (tmp_path / "scalr_jax").mkdir()
    with subprocess.Popen(["sleep", "100"], start_new_session=True) as left:
        (tmp_path / "scalr_jax/run.pid").write_text(f"{left.pid}\n")
        worker = subprocess.Popen(["bash", "-c", install], env={**os.environ, "HOME": str(tmp_path)})
        assert left.wait(timeout=30) == -15
    assert worker.wait(timeout=30) == 128  # Git, for this folder is no clone


# ---- one process


def worker(tmp_path, train, *, stop=False):
    write_script(tmp_path / "python", train)
    process = subprocess.Popen(
        [LAUNCH / "worker.sh", "--config.seed=1"],
        env={**os.environ, "CONFIG": "c.py", "WORKDIR": str(tmp_path), "PYTHON": str(tmp_path / "python")},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        overdue = threading.Timer(60, os.killpg, (process.pid, signal.SIGKILL))
        overdue.start()
        if stop:
            assert present(process.stdout).readline() == "ready\n"
            process.terminate()
        output = present(process.stdout).read()
        code = process.wait()
        overdue.cancel()
        return code, output


@pytest.mark.parametrize(("train", "code"), [(FINISH, 0), ("exit 2", 2), ("exit 1", 1), ("kill -ABRT $$", 134)])
def test_a_worker_says_whether_the_run_is_finished(train, code, tmp_path):
    assert worker(tmp_path, train)[0] == code


@pytest.mark.slow
def test_a_worker_hands_sigterm_on_and_waits_for_the_save(tmp_path):
    train = 'trap "sleep 1; echo saved; exit 0" TERM\necho ready\nwhile :; do sleep 0.1; done\n'
    assert worker(tmp_path, train, stop=True) == (75, "saved\n")


@pytest.mark.slow
def test_a_worker_whose_command_had_only_begun_to_start_is_to_run_again(tmp_path):
    assert worker(tmp_path, "echo ready\nexec sleep 60\n", stop=True) == (75, "")


def test_a_worker_starts_the_command(tmp_path):
    (tmp_path / "results.json").touch()
    assert worker(tmp_path, 'echo "$*"')[1] == f"-m scalr_jax.main --config=c.py --workdir={tmp_path} --config.seed=1\n"


# ---- Slurm (a real one is in launch_slurm_test.py)


def test_slurm_dry_run_shows_the_command(untouchable):
    settings = {**SETTINGS["slurm.sbatch"], "SLURM_CPUS_PER_TASK": "8"}
    result = launch("slurm.sbatch", "--dry-run", "--config.data.root=/a b", tools=untouchable, **settings)
    assert result.returncode == 0
    expected = "CONFIG=configs/smoke.py WORKDIR=/shared/run srun --kill-on-bad-exit=0 --label --cpus-per-task=8 "
    assert shlex.split(result.stdout) == [*expected.split(), "launch/worker.sh", "--config.data.root=/a b"]


def test_slurm_script_outside_a_job_says_what_it_is(untouchable):
    result = launch("slurm.sbatch", tools=untouchable, **SETTINGS["slurm.sbatch"])
    assert result.returncode == 2
    assert "sbatch" in result.stderr


# ---- GKE


def jobset(*arguments, **settings):
    result = launch("gke.sh", "--dry-run", *arguments, **{**SETTINGS["gke.sh"], **settings})
    assert result.returncode == 0, result.stderr
    return yaml.safe_load(result.stdout)


def check_jobset(document):
    """The JobSet's own fields by tests/launch/jobset_schema.json, the job in it by Kubernetes' schema."""
    jsonschema.validate(document, json.loads((ROOT / "tests/launch/jobset_schema.json").read_text()))
    for job in document["spec"]["replicatedJobs"]:
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
        kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize(
    ("settings", "slices", "hosts"),
    [({}, 1, 32), ({"SLICES": "4"}, 4, 32), ({"TOPOLOGY": "2x4", "CHIPS_PER_HOST": "8"}, 1, 1)],
)
def test_jobset_is_valid(settings, slices, hosts):
    document = jobset("--config.data.root=/shared/a b", '--config.x="\\', **settings)
    check_jobset(document)
    (job,) = document["spec"]["replicatedJobs"]
    assert job["replicas"] == slices
    assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == hosts
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == ["--config.data.root=/shared/a b", '--config.x="\\']
    assert {"name": "WORKDIR", "value": "/shared/run"} in container["env"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 1000
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == settings.get("TOPOLOGY", "4x4x8")


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        ((), "sepc", {}),
        (("spec", "failurePolicy"), "maxRestart", 3),
        (("spec", "failurePolicy"), "maxRestarts", "3"),
        (("spec", "failurePolicy", "rules", 0), "action", "Restart"),
        (("spec", "replicatedJobs", 0), "replica", 2),
        (("spec", "replicatedJobs", 0, "template", "spec"), "backofLimit", 0),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec"), "restartPolcy", "Never"),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0), "arg", []),
    ],
)
def test_a_field_that_is_misspelt_or_of_another_type_is_refused(path, key, value):
    document = jobset()
    part = document
    for step in path:
        part = part[step]
    part[key] = value
    with pytest.raises(jsonschema.ValidationError):
        check_jobset(document)


def test_a_setting_cannot_be_more_than_a_value():
    """YAML in a setting stays text."""
    document = jobset(IMAGE='x"\n                  securityContext: {privileged: true}  # $HOME')
    check_jobset(document)
    container = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert "privileged" not in container["securityContext"]
    assert container["image"].endswith("# $HOME")


def test_gke_gives_the_yaml_to_kubectl(tmp_path):
    write_script(tmp_path / "kubectl", f'echo "$*" >{tmp_path}/words; cat >{tmp_path}/given\n')
    assert launch("gke.sh", tools=tmp_path, **SETTINGS["gke.sh"]).returncode == 0
    assert (tmp_path / "words").read_text() == "apply --filename=-\n"
    assert yaml.safe_load((tmp_path / "given").read_text()) == jobset()


# ---- the image


def test_what_the_dockerfile_copies_is_all_that_a_run_needs(tmp_path):
    copies = [line.split()[1:] for line in (LAUNCH / "Dockerfile").read_text().splitlines() if line.startswith("COPY")]
    for *sources, target in copies:
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tmp_path / target)
            else:
                shutil.copy(ROOT / source, tmp_path / target)
    assert (tmp_path / "launch/worker.sh").stat().st_mode & 0o111
    user = [line for line in (LAUNCH / "Dockerfile").read_text().splitlines() if line.startswith("USER")]
    assert user == ["USER 1000:1000"]  # a number: Kubernetes cannot tell whether a name is root
    command = [sys.executable, "-m", "scalr_jax.main", "--config=configs/smoke.py", f"--workdir={tmp_path}/run"]
    result = subprocess.run(
        [*command, "--config.task=nothing"],  # the config is read, and refused before anything is computed
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 2
    assert "task = 'nothing'" in result.stderr
    main = subprocess.run(
        [sys.executable, "-c", "import scalr_jax; print(scalr_jax.__file__)"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert main.stdout.startswith(str(tmp_path))
