#!/bin/sh
# Installs Konsil from the bundle that this file lies in, without a network: docs/install.md, INSTALL.md in the bundle.
#
#   install.sh install [--python FILE]      install, or upgrade to, this bundle's release
#   install.sh check                        compare every file of the bundle with SHA256SUMS
#   konsil-install status                   which releases are installed, and which one runs
#   konsil-install rollback [VERSION]       go back to the release before, or to VERSION; states stay as they are
#   konsil-install uninstall                remove the software; settings, keys, ledgers and states stay
#
# --root DIR does it below DIR, for whoever runs this: no user is made, and no service is touched.
set -eu
LC_ALL=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export LC_ALL PATH
umask 022

here=$(cd "$(dirname "$(readlink -f "$0")")" && pwd)
root='' python='' command=${1:-help}
account=konsil
[ $# -eq 0 ] || shift

fail() { # what happened, what to do
    printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
    exit 1
}

said() { # a value of a BUNDLE file
    sed -n "s/^$2=//p" "$1/BUNDLE"
}

service() { # the unit of a release's role; nothing for auditors
    case $(said "$1" ROLE) in
        hospital-*) echo konsil-hospital ;;
        coordinator) echo konsil-coordinator ;;
    esac
}

managed() { # whether systemd runs here, and is ours to talk to
    [ -z "$root" ] && [ -d /run/systemd/system ]
}

current() { # the release that runs
    [ -e "$opt/current/BUNDLE" ] && said "$opt/current" VERSION
}

as_account() { # as the user whose files these are
    if [ -z "$root" ]; then runuser -u "$account" -- env HOME="$var" "$@"; else "$@"; fi
}

check_bundle() {
    if [ ! -f "$here/SHA256SUMS" ] || [ ! -d "$here/wheels" ]; then
        fail "$here is no bundle" "Run the install.sh in a bundle's unpacked folder."
    fi
    (cd "$here" && sha256sum --check --strict --quiet SHA256SUMS) >&2 ||
        fail "files of the bundle are damaged, missing or changed" \
            "Nothing was installed. Copy the bundle again, and compare the SHA-256 of its archive with the one you were told."
    listed=$(sed 's/^[0-9a-f]*  //' "$here/SHA256SUMS" | sort)
    found=$(cd "$here" && find . ! -type d ! -path ./SHA256SUMS | sed 's#^\./##' | sort)
    [ "$listed" = "$found" ] || fail "the bundle holds files that SHA256SUMS does not list" \
        "Nothing was installed. Unpack the bundle again, into an empty folder."
}

find_python() {
    wanted=$(said "$here" PYTHON)
    for candidate in ${python:-python$wanted python3}; do
        found=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        if [ "$found" = "$wanted" ]; then
            python=$candidate
            return
        fi
        other="$candidate is Python $found"
    done
    fail "this bundle is for Python $wanted, and ${other:-there is no ${python:-python3} here}" \
        "Take the bundle for this system (Debian 12: py3.11, Ubuntu 24.04: py3.12), or install python$wanted and give --python FILE."
}

check_machine() {
    [ "$(uname -m)" = "$(said "$here" MACHINE)" ] ||
        fail "this bundle is for $(said "$here" MACHINE), and this machine is $(uname -m)" "Take the bundle for it."
    version=$(said "$here" VERSION)
    case $version in '' | *[!0-9A-Za-z.]*) fail "$version is no version" "Make the bundle anew." ;; esac
    before=$(current) || before=''
    [ -n "$before" ] || return 0
    [ "$(service "$opt/current")" = "$(service "$here")" ] ||
        fail "this machine has the role $(said "$opt/current" ROLE), and the bundle is for $(said "$here" ROLE)" \
            "One role a machine: a coordinator must not hold a hospital's keys. Use another machine."
    newest=$(printf '%s\n%s\n' "$before" "$version" | sort -V | tail -n 1)
    [ "$newest" = "$version" ] ||
        fail "release $before is installed, and the bundle has $version" "To go back: konsil-install rollback"
}

make_account() {
    [ -z "$root" ] && [ -n "$(service "$here")" ] || return 0
    getent passwd "$account" >/dev/null || useradd --system --user-group --home-dir "$var" --no-create-home \
        --shell /usr/sbin/nologin --comment "Konsil" "$account"
}

make_folders() {
    [ -n "$(service "$here")" ] || return 0
    for folder in "$etc" "$var"; do
        mkdir -p "$folder"
        chmod 0700 "$folder"
        [ -n "$root" ] || chown "$account:$account" "$folder"
    done
}

make_environment() { # the folder of a release is its virtual environment
    target=$opt/$version
    if [ -e "$target/complete" ]; then
        cmp -s "$here/SHA256SUMS" "$target/SHA256SUMS" && return 0
        fail "another build of $version is installed, $(said "$target" ROLE)" \
            "konsil-install uninstall, which keeps ledgers and settings, then install this one."
    fi
    rm -rf "$target"
    mkdir -p "$opt"
    "$python" -I -m venv --without-pip "$target"
    pip=$(echo "$here"/tools/pip-*.whl)/pip
    # -i: no setting, no proxy and no index of this machine's has a say
    for step in "install --no-index --no-deps --only-binary=:all: --require-hashes --find-links=$here/wheels
        --no-cache-dir --quiet --requirement=$here/requirements.txt" "check"; do
        # shellcheck disable=SC2086 # words of a fixed text; folders with blanks are refused below
        env -i PATH="$PATH" LC_ALL="$LC_ALL" PIP_CONFIG_FILE=/dev/null PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore \
            "$target/bin/python" -I "$pip" $step >&2 || fail "the software could not be installed into $target" \
            "See above; $opt needs some gigabytes of free space. What was installed before goes on running."
    done
    for file in BUNDLE INSTALL.md LICENSE SHA256SUMS sbom.cdx.json install.sh systemd; do
        [ ! -e "$here/$file" ] || cp -R "$here/$file" "$target/"
    done
    : >"$target/complete"
}

wrap() { # a command that does not leave files of root's behind
    mkdir -p "$bin"
    if [ -n "$root" ] || [ -z "$(service "$opt/current")" ]; then
        ln -sfn "$opt/current/bin/$1" "$bin/$1"
        return
    fi
    cat >"$bin/$1.new" <<WRAPPER
#!/bin/sh
# Root becomes $account, whose files these are.
[ "\$(id -u)" -ne 0 ] || exec runuser -u $account -- env HOME=$var $opt/current/bin/$1 "\$@"
exec $opt/current/bin/$1 "\$@"
WRAPPER
    chmod 0755 "$bin/$1.new"
    mv "$bin/$1.new" "$bin/$1"
}

switch_to() { # a release that is complete; what runs is ended at a safe point, and started again
    unit=$(service "$opt/$1")
    running=no
    if [ -n "$unit" ] && managed && systemctl --quiet is-active "$unit"; then
        running=yes
        echo "ending $unit at a safe point ..."
        systemctl stop "$unit"
    fi
    [ $# -lt 2 ] || "$2" "$1" || { [ $running = no ] || systemctl start "$unit"; exit 1; }
    before=$(current) || before=''
    [ -z "$before" ] || [ "$before" = "$1" ] || printf '%s\n' "$before" >"$opt/previous"
    ln -sfn "$1" "$opt/current.new"
    mv -T "$opt/current.new" "$opt/current"
    if [ -n "$unit" ]; then
        mkdir -p "$units"
        cp "$opt/current/systemd/$unit.service" "$units/$unit.service.new"
        mv "$units/$unit.service.new" "$units/$unit.service"
    fi
    case $unit in
        konsil-hospital) wrap konsil-hospital && wrap konsil-audit ;;
        konsil-coordinator) wrap konsil-coordinator && wrap konsil-audit ;;
        *) wrap konsil-audit ;;
    esac
    ln -sfn "$opt/current/install.sh" "$bin/konsil-install"
    ! managed || systemctl daemon-reload
    [ $running = no ] || systemctl start "$unit" || fail "$unit $1 does not start" \
        "journalctl -u $unit says why. To go back: konsil-install rollback"
    echo "Konsil $1, $(said "$opt/current" ROLE), is installed in $opt/$1"
}

reads_states() { # an older release refuses what it cannot read, and changes nothing
    if [ -e "$etc/hospital.toml" ]; then
        as_account "$opt/$1/bin/konsil-hospital" ledger verify "$etc/hospital.toml" >/dev/null || {
            printf 'error: release %s does not accept the ledger\nhint: See above. Nothing was changed; %s\n' "$1" \
                "release $(current) stays installed." >&2
            return 1
        }
    fi
    if [ -e "$etc/coordinator.toml" ]; then
        # shellcheck disable=SC2016 # it is Python
        as_account "$opt/$1/bin/python" -I -c 'import sys
from pathlib import Path
from server.settings import read_settings
from server.store import Store
from shared_models.terminal import run
run(lambda: Store(read_settings(Path(sys.argv[1])).database_url).close())' "$etc/coordinator.toml" || return 1
    fi
}

need_root() {
    [ -n "$root" ] || [ "$(id -u)" -eq 0 ] || fail "this has to be done by root" "Run it with sudo."
}

while [ $# -gt 0 ]; do
    case $1 in
        --root) root=$(mkdir -p "$2" && cd "$2" && pwd) && shift 2 ;;
        --python) python=$2 && shift 2 ;;
        -*) fail "there is no option $1" "See $0 help." ;;
        *) wish=$1 && shift ;;
    esac
done
case "$root$here" in *[[:space:]]*) fail "there is a blank in the name of a folder" "Use a folder without." ;; esac
opt=$root/opt/konsil etc=$root/etc/konsil var=$root/var/lib/konsil
units=$root/usr/local/lib/systemd/system bin=$root/usr/local/bin

case $command in
    check)
        check_bundle
        echo "every file is as SHA256SUMS has it"
        ;;
    install)
        need_root
        check_bundle
        find_python
        check_machine
        make_account
        make_folders
        make_environment
        switch_to "$version"
        ;;
    rollback)
        need_root
        [ -n "${wish:-}" ] || wish=$(cat "$opt/previous" 2>/dev/null) || fail "there is no release before" "konsil-install status"
        [ -e "$opt/$wish/complete" ] || fail "release $wish is not installed" "konsil-install status"
        switch_to "$wish" reads_states
        ;;
    status)
        for folder in "$opt"/*/; do
            if [ ! -e "$folder/complete" ] || [ -L "${folder%/}" ]; then continue; fi
            mark=' '
            [ "$(said "$folder" VERSION)" != "$(current)" ] || mark='*'
            echo "$mark $(said "$folder" VERSION) $(said "$folder" ROLE)"
        done
        ;;
    uninstall)
        need_root
        unit=$(service "$opt/current" 2>/dev/null) || unit=''
        if [ -n "$unit" ] && managed; then systemctl disable --now "$unit"; fi
        rm -rf "$opt"
        for name in konsil-hospital konsil-coordinator konsil-audit konsil-install; do
            rm -f "$bin/$name" "$units/$name.service"
        done
        ! managed || systemctl daemon-reload
        echo "Konsil is removed. Kept: settings and keys in $etc, ledgers and states in $var, the user $account."
        echo "Ledgers say what patients' budgets have paid for: back them up before you remove anything by hand."
        ;;
    help | --help | -h) sed -n '2,/^set -eu/{/^set -eu/d;s/^# \{0,1\}//;p}' "$here/install.sh" ;;
    *) fail "there is no command $command" "See $0 help." ;;
esac
