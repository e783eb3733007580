# shellcheck shell=bash
# A new user's walk with systemd as the first process: the unit, the journal, fstab. Run by scripts/try-package.
# shellcheck source=tests/tools/package/common.sh
. /walk/common.sh

pid() { systemctl show -P MainPID fsys@data; }
restarted() { [[ $(systemctl show -P NRestarts fsys@data) == "$1" ]] && systemctl is-active -q fsys@data; }
save() { for ((i = $1; i < $2; i++)); do echo "$i" > "/mnt/fsys/f$i"; done; }
whole() { for ((i = $1; i < $2; i++)); do committed "f$i" "$i" || fail "f$i is lost"; done; }

step "install"
show cat /proc/1/comm
show systemctl --version
install /walk/fsys-mount_old.deb
mkdir -p /mnt/fsys

step "the service"
cat > /etc/fsys/data.env <<'ENV'
BACKING=/data
MOUNTPOINT=/mnt/fsys
OPTIONS=--config /etc/fsys/fsys.toml -o log_format=journald
ENV
cat > /etc/fsys/fsys.toml <<'TOML'
[limits]
slow_commit_ms = 1
commit_interval_ms = 3600000
pending_max = 100000
[[rule]]
match = "f[0-9]*"
durability = "relaxed"
TOML
show fsys config check /etc/fsys/fsys.toml
show systemctl enable --now fsys@data
echo first > /mnt/fsys/file
committed file first || fail "not committed at close"
show systemctl status --no-pager -l fsys@data
show fsys status
top

step "the journal has the log, as fields"
head -c 100M /dev/zero > /mnt/fsys/large
show journalctl -q --no-pager -o cat -t fsys-mount -n 6
has 'F_STEP=' journalctl -q --no-pager -o verbose -t fsys-mount -p warning || fail "a slow commit has no fields"
show journalctl -q --no-pager -o verbose -t fsys-mount -p warning -n 1

step "reload"
sed -i 's/^slow_commit_ms = 1$/slow_commit_ms = 1000/' /etc/fsys/fsys.toml
show systemctl reload fsys@data
has slow_commit_ms=1000 fsys status || fail "the file was not read again"

step "10,000 saves that wait for their commit, then systemctl stop"
save 0 10000
show fsys status
committed f9999 9999 && fail "committed already: nothing is tried"
began=$SECONDS
show systemctl stop fsys@data
echo "after $((SECONDS - began)) s"
show systemctl status --no-pager -l fsys@data || true
has 'ended healthy' systemctl show -P StatusText fsys@data || fail "the last word is not about the end"
unmounted || fail "still mounted"
whole 0 10000

step "kill -9 of the daemon: systemd starts it again"
systemctl start fsys@data
old=$(pid)
for i in {1..50}; do echo "$i" > "/mnt/fsys/kept$i"; done
kill -9 "$old"
soon restarted 1
for i in {1..50}; do committed "kept$i" "$i" || fail "kept$i is lost"; grep -q "^$i$" "/mnt/fsys/kept$i"; done
show journalctl -q --no-pager -o cat -u fsys@data -n 12

step "restart with 1,000 pending"
save 10000 11000
show systemctl restart fsys@data
whole 10000 11000

step "upgrade with the service active"
old=$(pid)
show dpkg -i /walk/fsys-mount_new.deb
[[ $(pid) == "$old" ]] || fail "the upgrade restarted the service"
echo second > /mnt/fsys/file
committed file second || fail "not committed after the upgrade"
show systemctl disable --now fsys@data

step "a line in fstab, as a unit of systemd"
echo '/data /mnt/fsys fsys x-systemd.requires-mounts-for=/data,config=/etc/fsys/fsys.toml,nofail 0 0' >> /etc/fstab
show tail -n 1 /etc/fstab
systemctl daemon-reload
show systemctl start mnt-fsys.mount
echo third > /mnt/fsys/file
committed file third || fail "not committed at close"
show systemctl status --no-pager -l mnt-fsys.mount
save 11000 13000
committed f12999 12999 && fail "committed already: nothing is tried"
show systemctl stop mnt-fsys.mount
unmounted || fail "still mounted"
# umount(8) does not wait for the daemon, and systemd does not end it.
soon committed f12999 12999
whole 11000 13000

step "remove with the mount active"
systemctl start mnt-fsys.mount
show dpkg -r fsys-mount
committed file third || fail "the data is gone"
gone
printf '\nwith systemd: installed, served, killed, restarted, upgraded, removed\n'
