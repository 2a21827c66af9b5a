"""Programs that read off a picture what it shows, without any network; `distillers.evaluate` makes figures of them."""
