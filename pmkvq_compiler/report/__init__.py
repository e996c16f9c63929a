"""What a compile tells people: report files, charts, and what the command line shows."""
