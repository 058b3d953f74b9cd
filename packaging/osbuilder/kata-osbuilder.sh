#!/bin/sh
# Build the guest image for the running kernel: a thin wrapper of "kata-runtime image build".
set -eu

usage() {
    cat <<EOT
Usage: ${0##*/} [-c] [-k VERSION] [-f agent|systemd] [-r FILE]
Build the guest image (kernel and initrd) for this machine's kernel, prove it by a boot, and use it.

  -c          only if there is no image of this kernel, or what it is made of has changed
  -k VERSION  kernel; default: the running one, else the newest that is installed
  -f FLAVOUR  process 1 of the guest: agent or systemd; default: guest_flavour of [katapod]
  -r FILE     recipe; default: /etc/kata-containers/image.toml if it is there
  -h          this text

KATA_RUNTIME names the program, default: kata-runtime.
EOT
}

check=
kernel=
flavour=
recipe=
while getopts ck:f:r:h option; do
    case $option in
        c) check=1 ;;
        k) kernel=$OPTARG ;;
        f) flavour=$OPTARG ;;
        r) recipe=$OPTARG ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
if [ $# -gt 0 ]; then
    echo "${0##*/}: unexpected argument $1" >&2
    usage >&2
    exit 2
fi
if [ -z "$kernel" ] && [ -e "/lib/modules/$(uname -r)/modules.dep" ]; then
    kernel=$(uname -r)
fi
set -- image build
[ -n "$check" ] || set -- "$@" --rebuild
[ -z "$kernel" ] || set -- "$@" --kernel "$kernel"
[ -z "$flavour" ] || set -- "$@" --flavour "$flavour"
[ -z "$recipe" ] || set -- "$@" --recipe "$recipe"
exec "${KATA_RUNTIME:-kata-runtime}" "$@"
