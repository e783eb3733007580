# shellcheck shell=bash
# A new user's walk where no systemd runs: README, a line in fstab, mount(8). Run by scripts/try-package.
# shellcheck source=tests/tools/package/common.sh
. /walk/common.sh

step "install"
apt-get update -q > /dev/null
install /walk/fsys-mount_old.deb
show fsys --version
show fsys-mount --version
test -e /sbin/mount.fsys || fail "no /sbin/mount.fsys"
for page in fsys fsys-status fsys-mount mount.fsys; do man -w 8 "$page" > /dev/null || fail "no manual page $page"; done
show fsys config check /etc/fsys/fsys.toml

step "README: the first mount"
mkdir -p /mnt/fsys
show fsys doctor /data /mnt/fsys || test $? = 64 || fail "doctor"
show fsys-mount /data /mnt/fsys
echo saved > /mnt/fsys/hello
committed hello saved || fail "not committed at close"
show fsys status
show fsys get /mnt/fsys/hello
show fsys bench --rounds 2 /mnt/fsys
show fsys drain
show fsys umount /mnt/fsys

step "README: an ordinary user"
install fuse3
useradd -m walker
show su -l walker -c 'mkdir data mnt && fsys-mount data mnt && echo mine > mnt/file && fsys status mnt | head -n 1 \
    && cat data/file && fsys umount mnt'

step "a line in fstab"
echo '/data /mnt/fsys fsys config=/etc/fsys/fsys.toml,nofail 0 0' >> /etc/fstab
show tail -n 1 /etc/fstab
show mount /mnt/fsys
show findmnt /mnt/fsys
echo first > /mnt/fsys/file
committed file first || fail "not committed at close"
show fsys status
top

step "a change while it runs"
show fsys set durability=relaxed --match '*.tmp'
echo x > /mnt/fsys/a.tmp
show fsys get /mnt/fsys/a.tmp
show fsys set --list
show fsys set --unset --all
printf 'durability = "always"\n[[rule]]\nmatch = "*.log"\ndurability = "fsync"\n' > /etc/fsys/fsys.toml
show fsys reload /mnt/fsys
echo x > /mnt/fsys/a.log
show fsys get /mnt/fsys/a.log
has fsys.toml:2 fsys get /mnt/fsys/a.log || fail "the rule of the file does not hold"
echo 'durabilty = "close"' > /etc/fsys/fsys.toml
! show fsys reload /mnt/fsys || fail "an error in the file was taken"
: > /etc/fsys/fsys.toml
show fsys reload /mnt/fsys

step "upgrade with the mount active"
show dpkg -i /walk/fsys-mount_new.deb | tee /walk/upgrade
grep -q '^ *[/]mnt/fsys$' /walk/upgrade || fail "the mount that goes on is not named"
show dpkg-query -W fsys-mount
echo second > /mnt/fsys/file
committed file second || fail "not committed after the upgrade"

step "removal while in use is refused"
sh -c 'cd /mnt/fsys && exec sleep 1000' &
user=$!
soon test "$(readlink /proc/$user/cwd)" = /mnt/fsys
! show dpkg -r fsys-mount || fail "removed under a program that uses it"
grep -q second /mnt/fsys/file || fail "the mount is gone although the removal was refused"
kill "$user"
wait "$user" || true

step "umount, mount again, remove with the mount active"
show umount /mnt/fsys
! findmnt /mnt/fsys || fail "still mounted"
# umount(8) does not wait for the daemon; the next mount does.
show mount /mnt/fsys
show fsys umount /mnt/fsys
show mount /mnt/fsys
show dpkg -r fsys-mount
committed file second || fail "the data is gone"
gone
sed -i /fsys/d /etc/fstab
printf '\nwithout systemd: installed, mounted, upgraded, removed\n'
