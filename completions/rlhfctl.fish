# fish completion of rlhfctl: source this file, or copy it to ~/.config/fish/completions/rlhfctl.fish.
# The words come from the command itself; after what ends in = . / fish puts no space by itself.
function __rlhfctl_candidates
    set -l words (commandline -opc)
    set -l typed
    for closing in '' "'" '"' # what is typed may be an open quote
        set typed (string unescape -- (commandline -ct)$closing) && break
    end
    _RLHFCTL_COMPLETE=fish $words "$typed" 2>/dev/null </dev/null
end
complete -c rlhfctl -e
complete -c rlhfctl -k -f -a '(__rlhfctl_candidates)'
