# shellcheck shell=bash
# What the walks of scripts/try-package share.
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive PAGER=cat SYSTEMD_PAGER=cat
cd /

step() { printf '\n======== %s\n' "$*"; }
fail() { echo "FAILED: $*" >&2; exit 1; }
# Runs a command as one reads it in a terminal: the line that was typed, what it said.
show() { printf '\n# %s\n' "$*"; "$@" 2>&1; }
# Whether the output of a command has a word. No pipe: who is not read to its end may fail.
has() { local word=$1 said; shift; said=$("$@" 2>&1) || true; [[ $said == *"$word"* ]]; }
# Waits until a condition holds, a minute at most.
soon() { for _ in {1..600}; do ! "$@" > /dev/null 2>&1 || return 0; sleep 0.1; done; fail "never: $*"; }

# apt of a package with what it depends on; its own chatter is shown if it fails.
install() {
    printf '\n# apt install %s\n' "$1"
    apt-get install -q -y --no-install-recommends "$1" > /walk/apt 2>&1 || { cat /walk/apt; fail "apt install $1"; }
    grep '^Setting up' /walk/apt
}

# A name that the kernel may know may also be a cached one: the backing directory is asked.
committed() { [[ $(cat "/data/$1" 2> /dev/null) == "$2" ]]; }

# The screen of `fsys top` while six programs save.
top() {
    local savers=() i
    for i in {1..6}; do
        (while sleep "0.0$i"; do echo "$RANDOM" > "/mnt/fsys/inbox$i"; done) &
        savers+=($!)
    done
    tmux -u -L walk new-session -d -x 110 -y 36 "fsys top --interval 1 /mnt/fsys"
    soon has "busiest processes" tmux -L walk capture-pane -p
    sleep 5
    # Without the empty lines at its end.
    printf '\n# fsys top\n%s\n' "$(tmux -L walk capture-pane -p)"
    tmux -L walk send-keys q
    # It ends with its only window.
    soon eval '! tmux -L walk list-sessions'
    kill "${savers[@]}"
    wait "${savers[@]}" || true
}

# findmnt -t succeeds where nothing is found.
unmounted() { [[ -z $(findmnt -n -t fuse.fsys) ]]; }

gone() {
    unmounted || fail "a mount is left"
    test -e /etc/fsys/fsys.toml || fail "the configuration is gone before the purge"
    show dpkg -P fsys-mount
    ! ls -d /usr/bin/fsys /usr/share/doc/fsys-mount /usr/lib/systemd/system/fsys@.service /sbin/mount.fsys \
        2> /dev/null || fail "something is left"
}
