# Made of what --help says by tests/manual.rs.
_peerix() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
    COMPREPLY=()
    case $prev in
    --port) return ;;
    --bind) return ;;
    --lan) return ;;
    --interface) return ;;
    --timeout) return ;;
    --peer) return ;;
    --private-key) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return ;;
    --trusted-public-key) return ;;
    --trusted-public-key-file) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return ;;
    --priority) return ;;
    --mode) mapfile -t COMPREPLY < <(compgen -W 'lan wan both' -- "$cur"); return ;;
    --tracker-url) return ;;
    --peer-id) return ;;
    --announce-addr) return ;;
    --upstream-cache) return ;;
    --filter-patterns) return ;;
    --friend) return ;;
    --friends-file) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return ;;
    --share) mapfile -t COMPREPLY < <(compgen -W 'all lan friends nobody' -- "$cur"); return ;;
    --upload-limit) return ;;
    --metrics) return ;;
    --root) mapfile -t COMPREPLY < <(compgen -d -- "$cur"); return ;;
    --store-dir) mapfile -t COMPREPLY < <(compgen -d -- "$cur"); return ;;
    --db) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return ;;
    --state-dir) mapfile -t COMPREPLY < <(compgen -d -- "$cur"); return ;;
    esac
    if [[ $cur == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W '--json --port --bind --lan --interface --timeout --peer --private-key --trusted-public-key --trusted-public-key-file --priority --mode --tracker-url --peer-id --announce-addr --no-verify --upstream-cache --no-filter --no-default-filters --filter-patterns --friend --friends-file --map-port --share --upload-limit --metrics --root --store-dir --db --state-dir --verbose --help --version' -- "$cur")
    elif ((COMP_CWORD == 1)); then
        mapfile -t COMPREPLY < <(compgen -W 'status peers why doctor identity' -- "$cur")
    elif [[ ${COMP_WORDS[1]} == why ]]; then
        mapfile -t COMPREPLY < <(compgen -f -- "${cur:-/nix/store/}")
    fi
}
complete -o filenames -F _peerix peerix
