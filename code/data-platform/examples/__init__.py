"""A small, independent code location: copy it to start a team's own."""
