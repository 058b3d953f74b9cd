#!/bin/sh
# Collect what a bug report needs, as Markdown on standard output. `kata-runtime collect-data` does the work; what it
# cannot tell because it does not start, this script tells itself.
set -u
name=${0##*/}
version="@VERSION@"

usage() {
    cat <<EOT
Usage: $name [-d] [-h] [-v] [--output FILE]

  -d, --debug        trace this script
  -h, --help         show this help
  -v, --version      show the version
  -o, --output FILE  write to FILE; default: standard output

PROBLEM_LIMIT=N in the environment: lines kept of each log (default 50).
Secrets are left out as far as they can be told: read the report before you publish it.
EOT
}

output=
while [ $# -gt 0 ]; do
    case $1 in
        -d | --debug) set -x ;;
        -h | --help) usage; exit 0 ;;
        -v | --version) echo "$name version $version"; exit 0 ;;
        -o | --output)
            [ $# -ge 2 ] || { echo "$name: cannot use $1: it needs a file" >&2; exit 1; }
            output=$2
            shift
            ;;
        --output=*) output=${1#--output=} ;;
        *) echo "$name: cannot use $1: there is no such option; see $name --help" >&2; exit 1 ;;
    esac
    shift
done
if [ "$(id -u)" != 0 ]; then
    echo "$name: cannot collect data: this needs root" >&2
    exit 1
fi

runtime="${0%/*}/kata-runtime"
[ -x "$runtime" ] || runtime=$(command -v kata-runtime || echo kata-runtime)

umask 077
scratch=$(mktemp -d) || exit 1
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

if "$runtime" collect-data > "$scratch/report" 2> "$scratch/error"; then
    cat "$scratch/error" >&2
else
    status=$?
    [ $status -lt 128 ] || exit $status
    [ $status -ne 130 ] || exit 130
    # No configuration, log or command line here: secrets are taken out by the program that does not start.
    {
        echo "<details><summary>kata-runtime does not start</summary><p>"
        echo
        for command in "date -u" "uname -a" "cat /etc/os-release" "ls -lL $runtime" "python3 --version" \
            "ls -l /var/cache/kata-containers/" "ls -l /run/vc/sbs" "ls -l /dev/kvm /dev/vhost-vsock /dev/vhost-net" \
            "qemu-system-x86_64 --version" "crun --version" "containerd --version" "crio --version" "free -m" \
            "df -h /var/lib /run /tmp"; do
            echo "### $command"
            echo
            echo '~~~~'
            $command 2>&1 | head -n 50
            echo '~~~~'
            echo
        done
        echo "### packages"
        echo
        echo '~~~~'
        { dpkg-query -W -f '${Package} ${Version}\n' 2> /dev/null || rpm -qa 2> /dev/null; } |
            grep -E 'kata|qemu|virtiofs|linux-image|crun|containerd|cri-o|^python3' | head -n 100
        echo '~~~~'
        echo
        echo "### $runtime collect-data: exit status $status"
        echo
        echo '~~~~'
        tail -n 30 "$scratch/error" | cut -c 1-500
        echo '~~~~'
        echo "</p></details>"
    } > "$scratch/report"
    echo "$name: kata-runtime failed with status $status; the report holds what could be found out without it" >&2
fi
if [ -n "$output" ]; then
    cat "$scratch/report" > "$output" || exit 1
    echo "written to $output; read it before you publish it" >&2
else
    cat "$scratch/report"
fi
