"""One HTML page of what runs have measured: `collect` reads folders, `page` draws them. No run is made here."""
