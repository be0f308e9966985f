//! The queue between TUN and a connection.
