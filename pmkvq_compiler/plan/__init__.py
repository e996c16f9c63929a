"""Planning: decides which bits each layer gets, by an integer program and by trying plans on texts."""
