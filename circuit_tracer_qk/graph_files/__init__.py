"""The JSON that the page reads: nodes, links, tables, the list of graphs, feature files."""
