# bash completion of rlhfctl: source this file, or copy it to ~/.local/share/bash-completion/completions/rlhfctl.
# The words come from the command itself; what ends in = . / is not finished, so no space follows it.
_rlhfctl() {
    local found
    found=$(_RLHFCTL_COMPLETE=bash COMP_LINE="${COMP_LINE:0:COMP_POINT}" COMP_WORDBREAKS="$COMP_WORDBREAKS" \
        "$1" 2>/dev/null </dev/null)
    COMPREPLY=()
    [[ -n $found ]] && mapfile -t COMPREPLY <<<"$found"
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=./] ]] && compopt -o nospace
}
complete -F _rlhfctl rlhfctl
