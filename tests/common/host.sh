# Run by `unshare` inside a new host's namespaces: builds a root directory of its own on a tmpfs and moves into it.
# $1 an empty directory to mount on, $2 the root directory the programs come from, $3... directories to show
# at the same place inside.
set -e
root=$1 base=${2%/}
shift 2
# Duplicate address detection would block IPv6 addresses for two seconds.
echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad
mount -t tmpfs -o mode=755,size=90% peerix-host "$root"
cd "$root"
# Starts few processes, because the tests create a thousand hosts.
links= shown= files=
for dir in usr bin sbin lib lib32 lib64 libx32 gnu; do
    if [ -L "$base/$dir" ]; then
        links="$links $dir"
    elif [ -d "$base/$dir" ]; then
        shown="$shown $dir"
    fi
done
for dir in etc/ld.so.conf.d etc/alternatives; do
    if [ -d "$base/$dir" ]; then shown="$shown $dir"; fi
done
for file in passwd group nsswitch.conf ld.so.cache ld.so.conf; do
    if [ -e "$base/etc/$file" ]; then files="$files $file"; fi
done
for dir; do
    set -- "$@" "$root$dir"
    shift
done
cd "$base/"
if [ "$links" ]; then cp -P $links "$root"; fi
cd "$root"
mkdir -m 1777 tmp
mkdir -p proc sys dev run nix root etc machine $shown "$@"
cd "$base/etc"
cp $files "$root/etc"
cd "$root"
for dir in $shown; do mount --rbind "$base/$dir" "$dir"; done
for dir; do mount --bind "${dir#"$root"}" "$dir"; done
mount --rbind /dev dev
mount -t proc proc proc
mount -t tmpfs -o mode=755,size=90% peerix-nix nix
pivot_root . machine
cd /
umount -l machine
rmdir machine
echo ready
# Ends, and with it every process in here, when the test closes our input or is gone.
exec cat
