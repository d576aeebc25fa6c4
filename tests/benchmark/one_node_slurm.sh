#!/usr/bin/env bash
# SLURM on this machine alone, for test_slurm.py. As root, after: apt-get install -y munge slurmctld slurmd slurm-client
set -euo pipefail
host=$(hostname -s)
mkdir -p /run/munge /etc/slurm /var/spool/slurm/{ctld,d}
chown munge:munge /run/munge
cat > /etc/slurm/slurm.conf <<CONF
ClusterName=one
SlurmctldHost=$host
SlurmUser=root
SlurmdUser=root
StateSaveLocation=/var/spool/slurm/ctld
SlurmdSpoolDir=/var/spool/slurm/d
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=/var/log/slurmctld.log
SlurmdLogFile=/var/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
NodeName=$host CPUs=$(nproc) RealMemory=$(free -m | awk '/Mem:/ {print $2}') State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
pgrep -x munged > /dev/null || su -s /bin/sh munge -c munged
pgrep -x slurmctld > /dev/null || slurmctld
pgrep -x slurmd > /dev/null || slurmd
for _ in $(seq 30); do
    sinfo --noheader --states=idle | grep -q . && exit 0
    sleep 1
done
sinfo
exit 1
