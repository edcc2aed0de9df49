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
mkdir proc sys dev tmp run nix root etc machine
chmod 1777 tmp
for dir in usr bin sbin lib lib32 lib64 libx32 gnu; do
    if [ -L "$base/$dir" ]; then
        cp -P "$base/$dir" "$dir"
    elif [ -d "$base/$dir" ]; then
        mkdir "$dir"
        mount --rbind "$base/$dir" "$dir"
    fi
done
for dir in ld.so.conf.d alternatives; do
    if [ -d "$base/etc/$dir" ]; then
        mkdir "etc/$dir"
        mount --bind "$base/etc/$dir" "etc/$dir"
    fi
done
files=
for file in passwd group nsswitch.conf ld.so.cache ld.so.conf; do
    if [ -e "$base/etc/$file" ]; then files="$files $base/etc/$file"; fi
done
cp $files etc/
for dir; do
    mkdir -p "$root$dir"
    mount --bind "$dir" "$root$dir"
done
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
