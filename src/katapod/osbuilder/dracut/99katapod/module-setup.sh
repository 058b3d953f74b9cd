#!/bin/bash
# dracut module of Katapod: the guest image with kata-agent as its init.
#
# The image builder hands over, by environment:
#   KATAPOD_BINARIES  a file with one "source<TAB>target" a line: ELF files that bring their shared libraries
#   KATAPOD_STAGE     a directory laid out as in the guest, copied as it is
#   KATAPOD_DONE      a file made once everything is in; dracut itself goes on after a failed module

check() {
    # Never part of a host's own initramfs, which has none of these variables.
    [[ -n ${KATAPOD_STAGE-} ]] || return 255
}

depends() {
    return 0
}

install() {
    local source target name
    while IFS=$'\t' read -r source target; do
        inst_binary "$source" "$target" || return 1
        # dracut resolves the libraries of executable files only; extension modules of Python are not.
        chmod 0755 "${initdir:?}/${target}" || return 1
    done < "${KATAPOD_BINARIES:?}"

    # Into directories that dracut has made as symbolic links (/lib on a merged /usr), hence tar and not cp.
    tar -C "${KATAPOD_STAGE:?}" -cf - . | tar -C "${initdir:?}" -xf - --keep-directory-symlink || return 1

    # What dracut lays out for its own init scripts, which are not here.
    rm -rf "${initdir:?}/lib/dracut/hooks" "${initdir:?}/etc/cmdline.d" "${initdir:?}/sysroot"

    # Where /usr is not merged the guest still finds its modules under both names.
    if [[ ! -L ${initdir}/lib && ! -e ${initdir}/lib/modules ]]; then
        ln -s ../usr/lib/modules "${initdir}/lib/modules"
    fi
    : > "${KATAPOD_DONE:?}"
}
