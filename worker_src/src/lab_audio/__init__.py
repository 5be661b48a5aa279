"""The workers of lab.audio: every recording becomes exactly one set of rows and one object."""
