#!/bin/sh
# A trial of three hospitals in containers, on public data; every step is the command that people would type.
#
#   trial.sh up       found a consortium, enrol three hospitals, start everybody, train a model, show how it goes
#   trial.sh audit    have every hospital export its evidence, and an auditor verify it
#   trial.sh down     end everything, and delete all of it, keys and ledgers included
#
# COMPOSE is the command for compose, `docker compose` by default; ROUNDS is how many rounds to train, 25 by default.
set -eu
cd "$(dirname "$0")"

HOSPITALS="hospital-1 hospital-2 hospital-3"

compose() {
    ${COMPOSE:-docker compose} --file compose.yaml --profile audit "$@"
}

# A command of one party, in a container of its own with the party's volume.
as() {
    party=$1
    shift
    compose run --rm --no-deps -T "$party" "$@" </dev/null
}

# The same for shell commands: what somebody does with an editor, or carries by hand.
by_hand() {
    compose run --rm --no-deps -T --entrypoint sh "$1" -euc "$2" </dev/null
}

# What stands behind these words at the beginning of a line: what would be read out on the telephone.
after() {
    tr -d '\r' | sed -n "s/^$1  *//p"
}

# As declared by each steward: rounded, and no secret.
public_size() {
    case $1 in
        hospital-1) echo 230 ;;
        hospital-2) echo 130 ;;
        hospital-3) echo 60 ;;
    esac
}

up() {
    root=$(as coordinator init . --address coordinator:9092 --consortium trial | after 'root key')
    as coordinator example breast-cancer /srv/konsil/data --hospitals 3
    for hospital in $HOSPITALS; do
        fingerprint=$(as "$hospital" init . --name "$hospital" --coordinator coordinator:9092 \
            --public-size "$(public_size "$hospital")" --epsilon 4 --delta 3e-4 --order 12 | after fingerprint)
        # Where the records are, and studies of which task need not wait for the steward.
        by_hand "$hospital" "
            cp $hospital.request.json /srv/konsil/
            sed -i -e 's|^records = .*|records = \"/srv/konsil/data/$hospital\"|' \
                -e 's|^# standing_approvals = .*|standing_approvals = [{tasks = [\"breast-cancer\"]}]|' hospital.toml"
        as coordinator enrol "/srv/konsil/$hospital.request.json" --settings coordinator.toml \
            --fingerprint "$fingerprint"
    done
    as coordinator sign roster.next.json --root-key root/root.key --settings coordinator.toml
    as coordinator issue operator --role operator --settings coordinator.toml --connect localhost:9093
    # The page, open to who has the token; and the plan that comes with the coordinator, for this many rounds.
    by_hand coordinator "
        cp kits/*.kit.json root.pub /srv/konsil/
        (umask 077; python3 -c 'import secrets; print(secrets.token_hex(32))' > viewers.token)
        printf '\n[page]\nhost = \"0.0.0.0\"\nport = 8443\ntoken_file = \"viewers.token\"\n' >> coordinator.toml
        python3 -c 'import importlib.resources as r; print(r.files(\"server\").joinpath(\"plans/breast-cancer.toml\").read_text())' |
            sed 's/^rounds = .*/rounds = ${ROUNDS:-25}/' > plan.toml"
    for hospital in $HOSPITALS; do
        as "$hospital" join hospital.toml "/srv/konsil/$hospital.kit.json" --root-fingerprint "$root"
    done
    # shellcheck disable=SC2086 # one word each
    compose up --detach coordinator $HOSPITALS
    tries=30
    until compose exec -T coordinator konsil-coordinator submit plan.toml </dev/null; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || exit 1
        sleep 2
    done
    compose exec -T coordinator konsil-coordinator watch breast-cancer </dev/null
    echo "The page: https://localhost:8443. Its token: ${COMPOSE:-docker compose} exec coordinator cat viewers.token"
}

audit() {
    by_hand coordinator "
        mkdir -p /srv/konsil/evidence/study
        cp state/studies/breast-cancer/receipts.jsonl state/studies/breast-cancer/sums.jsonl /srv/konsil/evidence/study/"
    for hospital in $HOSPITALS; do
        as "$hospital" ledger export hospital.toml "/srv/konsil/evidence/$hospital.evidence"
    done
    as auditor verify /srv/konsil/evidence --root /srv/konsil/root.pub
}

case ${1:-} in
    up) up ;;
    audit) audit ;;
    down) compose down --volumes ;;
    *) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
