"""The cluster of these tests does what the others take for granted."""

import os


def test_two_nodes(cluster, tmp_path):
    resolves = "$(getent ahostsv4 $0 | grep -c STREAM)"
    task = f"echo $SLURM_PROCID $SLURM_NTASKS $SLURM_LOCALID $SLURMD_NODENAME $(hostname) {resolves}"
    ran = cluster.run("srun", "--nodes=2", "--ntasks-per-node=2", "sh", "-c", task, cluster.nodes[0], cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    hosts = cluster.nodes if cluster.own_hostnames else [os.uname().nodename] * 2
    expected = [f"{rank} 4 {rank % 2} {cluster.nodes[rank // 2]} {hosts[rank // 2]} 1" for rank in range(4)]
    assert sorted(ran.stdout.splitlines()) == expected


def test_pretended_gpus(cluster, tmp_path):
    command = ("sh", "-c", "echo $CUDA_VISIBLE_DEVICES")
    ran = cluster.run("srun", "--nodes=2", "--gpus-per-node=2", *command, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (0, "0,1\n" * 2)
