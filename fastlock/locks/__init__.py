"""The two artefacts, lock and receipt. It knows no model."""
