#!/bin/sh
# systemd as the first process of namespaces of its own: `systemd_box.sh CHECKOUT PYTHON UNIT SCRATCH`, as root.
#
# CHECKOUT: of EDM, with its .venv; PYTHON: the prefix of that one's Python; UNIT: put where units are; SCRATCH: an empty
# directory. What it writes goes to a tmpfs over the machine's files, and is gone with it. It ends when it is killed.
set -eu
if [ "$1" != inside ]; then
  group=/sys/fs/cgroup
  [ ! -d "$group/unified" ] || group=$group/unified
  group=$group/edm-box-$$
  mkdir "$group"
  echo $$ >"$group/cgroup.procs"
  exec unshare --mount --pid --fork --kill-child --cgroup --net --uts --ipc sh "$0" inside "$@"
fi
checkout=$2 python=$3 unit=$4 scratch=$5
root=$scratch/root
mount --make-rprivate /
mount -t tmpfs tmpfs "$scratch"
mkdir "$scratch/up" "$scratch/work" "$root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$scratch/up,workdir=$scratch/work" "$root"
# Nothing of the machine's can be set from inside. Source: systemd.io/CONTAINER_INTERFACE.
mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
for directory in run tmp dev; do mount -t tmpfs -o mode=755 tmpfs "$root/$directory"; done
chmod 1777 "$root/tmp"
mkdir "$root/dev/shm" "$root/dev/pts"
mount -t devpts -o newinstance,ptmxmode=666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
for device in null zero full random urandom tty; do
  : >"$root/dev/$device"
  mount --bind "/dev/$device" "$root/dev/$device"
done
# EDM where the unit looks for it, and readable for users that may not look into the checkout's place.
mkdir -p "$root/opt/checkout" "$root/opt/python" "$root/opt/edm/bin" "$root/old"
mount --bind "$checkout" "$root/opt/checkout"
mount --bind "$python" "$root/opt/python"
cat >"$root/opt/edm/bin/edm" <<'END'
#!/bin/sh
site=$(echo /opt/checkout/.venv/lib/python3*/site-packages)
exec env PYTHONHOME=/opt/python PYTHONPATH=/opt/checkout:"$site" PYTHONDONTWRITEBYTECODE=1 \
  /opt/python/bin/python3 -m edm "$@"
END
sed 's/-m edm/-c/' "$root/opt/edm/bin/edm" >"$root/opt/edm/bin/python"
chmod 755 "$root/opt/edm/bin/edm" "$root/opt/edm/bin/python"
cp "$unit" "$root/etc/systemd/system/edm-dms.service"
ip link set lo up
cd "$root"
pivot_root . old
umount -l old
# The credentials of a unit are mounted by a process beside it. Source: mount_namespaces(7).
mount --make-rshared /
exec env -i container=edm PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system --unit=basic.target
