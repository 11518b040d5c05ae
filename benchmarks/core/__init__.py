"""What every benchmark needs: timing, memory, the machine's facts, records, tables on the screen and
in Markdown. Knows no loss."""
