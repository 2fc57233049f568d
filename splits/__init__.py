"""Dataset facts as data: classes with ids, groups, published counts."""
