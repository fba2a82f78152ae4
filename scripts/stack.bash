# shellcheck shell=bash
# To be sourced by scripts/demo and scripts/dev: builds the plugin and the
# simulator, starts the simulator and a Vault dev server on free loopback
# ports, and registers, enables and configures the engine. Everything lives in
# a temporary folder, $work, that goes away with the script.
#
# Sets root, work, vault, VAULT_ADDR and VAULT_TOKEN.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(cd "$(mktemp -d "${TMPDIR:-/tmp}/cable-secrets.XXXXXX")" && pwd -P) # Vault refuses a plugin folder behind a link
children=()

# stop_stack ends what this script has started, and nothing else.
stop_stack() {
  trap '' INT TERM # a second Ctrl-C must not leave half of this undone
  trap - EXIT
  local pid
  for ((i = ${#children[@]} - 1; i >= 0; i--)); do
    pid=${children[i]}
    kill "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
  done
  rm -rf "$work"
}

# poll COMMAND... waits until the command succeeds, at most 30 seconds.
poll() {
  local deadline=$((SECONDS + 30))
  until "$@" >/dev/null 2>&1; do
    if ((SECONDS > deadline)); then
      echo "gave up waiting for: $*" >&2
      tail -n 20 "$work"/*.log >&2 || true
      return 1
    fi
    read -rt 0.1 <> <(:) || true
  done
}

# free_port prints a loopback port that nothing listens on, nor on the next one,
# which Vault takes too.
free_port() {
  local port
  for _ in {1..100}; do
    port=$((20000 + RANDOM % 20000))
    if ! (exec 3<> "/dev/tcp/127.0.0.1/$port" || exec 3<> "/dev/tcp/127.0.0.1/$((port + 1))") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
  echo 'found no free port' >&2
  return 1
}

# build_stack builds what is not built yet, and finds the Vault binary.
build_stack() {
  make -s -C "$root" build
  vault=$("$root/scripts/vault" --path)
}

# start_simulator starts cable-sim; $work/token-url, $work/refresh-key and
# $work/control-url are there when it returns.
start_simulator() {
  "$root/bin/cable-sim" -url-file "$work/token-url" -refresh-key-out "$work/refresh-key" \
    -control 127.0.0.1:0 -control-url-file "$work/control-url" -latency 20ms 2> "$work/cable-sim.log" &
  children+=($!)
  poll test -s "$work/token-url" -a -s "$work/control-url"
}

# start_vault starts a dev server with a plugin folder of its own.
start_vault() {
  local port
  port=$(free_port)
  mkdir "$work/plugins"
  cp "$root/bin/vault-plugin-secrets-cable" "$work/plugins/"
  printf 'plugin_directory = "%s"\n' "$work/plugins" > "$work/server.hcl"
  export VAULT_ADDR=http://127.0.0.1:$port VAULT_TOKEN=root
  unset VAULT_NAMESPACE VAULT_CACERT VAULT_FORMAT
  "$vault" server -dev -dev-root-token-id="$VAULT_TOKEN" -dev-no-store-token \
    -dev-listen-address="127.0.0.1:$port" -config="$work/server.hcl" -log-level=debug > "$work/vault.log" 2>&1 &
  children+=($!)
  poll "$vault" status
}

# vault runs the CLI.
vault() { "$vault" "$@"; }

# register_plugin registers the plugin in its version and enables it at cable/.
register_plugin() {
  local version sha
  version=$("$root/bin/vault-plugin-secrets-cable" -version | cut -d' ' -f2 | tr -d ,)
  sha=$( (sha256sum "$work/plugins/vault-plugin-secrets-cable" 2>/dev/null || shasum -a 256 "$work/plugins/vault-plugin-secrets-cable") | cut -d' ' -f1)
  run vault plugin register -sha256="$sha" -version="$version" secret vault-plugin-secrets-cable
  run vault secrets enable -path=cable vault-plugin-secrets-cable
}

# show prints a line as it would be typed, in bold on a terminal.
show() {
  if [[ -t 1 && -z ${NO_COLOR:-} ]]; then
    printf '\n\033[1m$ %s\033[0m\n' "$*"
  else
    printf '\n$ %s\n' "$*"
  fi
}

# run shows a command and its output.
run() {
  show "$@"
  "$@"
}
