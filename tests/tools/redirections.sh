#!/bin/sh
# What shells and small tools do with files every day, in the current directory; takes two seconds.
# Prints what it reads back. NOTES is a directory for its own notes, outside what is compared.
# shellcheck disable=SC2094 # reading a file that is being written is what this is about
set -eu
umask 027

echo one > plain
echo two >> plain
echo three >> plain
cat plain

cat > here <<'END'
a here-document
of two lines
END
cat here
cat >> here <<END
and one more: $((6 * 7))
END
cat here

: > emptied
echo something > emptied
: > emptied
wc -c < emptied
: > untouched-empty

echo kept > guarded
set -C
(echo clobbered > guarded) 2> /dev/null || echo "noclobber holds"
set +C
cat guarded

# One descriptor for many commands: every command closes its copy of it.
exec 3> kept-open
echo first >&3
(echo "from a subshell" >&3)
cat kept-open
/bin/echo "from a program" >&3
cat kept-open
exec 3>&-
cat kept-open

exec 4<> both-ways
echo written >&4
exec 4>&-
cat both-ways

{ echo "to stdout"; echo "to stderr" >&2; } > merged.log 2>&1
cat merged.log

echo "a long line that is overwritten at its start" > partly
printf 'A LONG' 1<> partly
cat partly

seq 1 1000 > numbers
sort -r -n -o numbers numbers
head -n 2 numbers
for i in 1 2 3 4 5; do echo "from the loop $i"; done > loop
wc -l < loop
echo replaced > loop
cat loop
cat plain here > joined
tee copy-a copy-b < joined | cksum
tee -a copy-a < plain | cksum
cksum < copy-a
dd if=plain of=joined conv=notrunc bs=1 seek=4 status=none
cat joined
truncate -s 7 copy-b
cat copy-b; echo
truncate -s 70000 copy-b
cksum < copy-b
cp plain copied
cp -p plain copied-with-times
mv copied moved
ln moved linked
echo "through the first name" > moved
cat linked
ln -s moved soft
echo "through the symlink" > soft
cat linked
split -l 300 numbers part-
cksum part-*
install -m 0711 plain installed
mktemp ./temp-XXXXXX > "$NOTES/temp"
rm "$(cat "$NOTES/temp")"
(cd . && echo "written, then removed while open" > ghost && exec 5< ghost && rm ghost && cat <&5)

# A background job keeps its log open, and tail follows it line by line.
wait_for() {
    tries=0
    until grep -qx "$1" "$NOTES/seen" 2> /dev/null; do
        tries=$((tries + 1))
        if [ "$tries" -gt 600 ]; then
            echo "tail did not show: $1" >&2
            return 1
        fi
        sleep 0.05
    done
}
: > log
(
    i=1
    while [ "$i" -le 8 ]; do
        echo "line $i"
        wait_for "line $i"
        # Another program makes the log durable while it is open for writing, and reads it.
        if [ "$i" = 4 ]; then
            sync -d log
            cat log > log-at-4
        fi
        i=$((i + 1))
    done
    echo "job done"
) > log &
job=$!
tail -n +1 -s 0.05 --pid="$job" -f log > "$NOTES/seen" &
follower=$!
wait "$job"
wait "$follower"
cat "$NOTES/seen"
cat log log-at-4

# The same with appends from two jobs into one log.
(for i in $(seq 1 50); do echo "a $i" >> shared; done) &
first=$!
(for i in $(seq 1 50); do echo "b $i" >> shared; done) &
second=$!
wait "$first"
wait "$second"
sort shared > "$NOTES/sorted"
sort "$NOTES/sorted" > shared
cksum < shared
stat -c '%A %h %U:%G %s %n' -- *
