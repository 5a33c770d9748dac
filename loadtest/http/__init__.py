"""HTTP/1.1 for streamed answers: connections kept and reused, events read, every arrival timed when it comes."""
