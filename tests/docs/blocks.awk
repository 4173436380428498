# Writes each block of a page to OUT.LINE, and a line `LINE KIND REASON` for it to OUT.blocks. Kinds
# are `sh`, `monitor`, `clean` (run only in a clean Debian, for the reason) and `not` (not run, for the
# reason).

function finish() {
  if (!start) return
  print start, kind, reason >(out ".blocks")
  close(out "." start)
  start = 0
  kind = "sh"
  reason = ""
}

BEGIN { kind = "sh" }

# Comments may have several lines.
/^ *<!--/ { comment = "" }
comment != "" || /^ *<!--/ {
  comment = comment " " $0
  if (!/-->/) next
  gsub(/ *<!-- *| *-->/, "", comment)
  gsub(/  +/, " ", comment)
  if (comment ~ /^not run: ./) {
    kind = "not"
    reason = substr(comment, 10)
  } else if (comment ~ /^in a clean Debian: ./) {
    kind = "clean"
    reason = substr(comment, 20)
  } else if (comment == "QEMU monitor") {
    kind = "monitor"
  }
  comment = ""
  empty = 1
  next
}

/^ *```/ {
  if (fence) {
    fence = 0
    finish()
  } else {
    fence = 1
    shell = /```sh$/
    if (shell) start = NR + 1
  }
  next
}
fence { if (shell) print >(out "." start); next }

/^$/ {
  if (start) held = held "\n"
  empty = 1
  next
}
/^    / && (empty || start) {
  if (!start) { start = NR; held = "" }
  printf "%s%s\n", held, substr($0, 5) >(out "." start)
  held = ""
  empty = 0
  next
}
{
  finish()
  # Text after a comment, and before any block: the comment belongs to nothing.
  if (kind != "sh") {
    print FILENAME ":" FNR ": a comment stands before no block" >"/dev/stderr"
    exit 1
  }
  empty = 0
}
END { finish() }
