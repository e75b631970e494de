"""More ways in and out: other formats, data sets, scoring, chat, page."""
