# Made of what --help says by tests/manual.rs.
_peerix_tracker() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]}
    COMPREPLY=()
    case $prev in
    --port) return ;;
    --host) return ;;
    --db-path) mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return ;;
    --filter-memory) return ;;
    --proxy) return ;;
    esac
    if [[ $cur == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W '--port --host --db-path --filter-memory --proxy --verbose --help --version' -- "$cur")
    fi
}
complete -o filenames -F _peerix_tracker peerix-tracker
