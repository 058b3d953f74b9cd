#!/bin/bash
# dracut module of Katapod: the guest image with kata-agent as its init.
#
# The image builder hands over, by environment:
#   KATAPOD_BINARIES  a file with one "source<TAB>target" a line: ELF files that bring their shared libraries
#   KATAPOD_STAGE     a directory laid out as in the guest, copied as it is
#   KATAPOD_HOOK      a program to run over the finished tree, or nothing; KATAPOD_HOOK_LOG is for what it says
#   KATAPOD_DONE      a file made once everything is in; dracut itself goes on after a failed module

check() {
    # Never part of a host's own initramfs, which has none of these variables.
    [[ -n ${KATAPOD_STAGE-} ]] || return 255
}

depends() {
    return 0
}

run_hook() {
    # dracut brings the libraries only after all modules; the hook wants to chroot into the tree.
    if [[ -n ${DRACUT_INSTALL-} ]]; then
        find "${initdir:?}" -type f -perm /0111 ! -name '*.ko' -print0 \
            | xargs -r -0 "$DRACUT_INSTALL" -D "$initdir" -R -- || return 1
    fi
    # What it mounts goes with it. Its root is the tree as the guest will see it.
    (
        cd "${initdir:?}" || exit 1
        exec unshare --mount env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
            KATAPOD_ROOT="$initdir" KATAPOD_KERNEL_VERSION="${kernel:?}" \
            "$KATAPOD_HOOK" "$initdir" < /dev/null
    ) > "${KATAPOD_HOOK_LOG:?}" 2>&1
    local status=$?
    ((status == 0)) || echo "(exit status $status)" >> "$KATAPOD_HOOK_LOG"
    return "$status"
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

    if [[ -n ${KATAPOD_HOOK-} ]]; then
        run_hook || return 1
    fi
    : > "${KATAPOD_DONE:?}"
}
