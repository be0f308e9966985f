//! Parsing of inner IP packets.
