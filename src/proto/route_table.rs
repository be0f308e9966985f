//! Inner address to session to connections.
