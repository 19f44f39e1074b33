"""The stages study: pipelines of up to 1,024 stages, predicted from measured parts."""
